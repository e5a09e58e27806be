"""Compiled models read ahead without being compiled again for every shape."""

import torch
from torch._dynamo.testing import CompileCounter

from memformer.evaluation.reading_ahead import AheadReader
from memformer.models.presets import preset_fields
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_for_every_shape():
    model = tiny_model(num_slots=6, **preset_fields("recall"))
    segments = torch.randint(0, VOCAB_SIZE, (3, 20, SEGMENT_LENGTH), generator=torch.Generator().manual_seed(7))
    expected = AheadReader(model).read(segments, memory=model.initial_memory(3))
    counter = CompileCounter()
    model.compile(backend=counter)
    model.encode(segments[:, 0], memory=model.initial_memory(3))
    number = counter.frame_count
    assert_close(AheadReader(model).read(segments, memory=model.initial_memory(3)), expected)
    assert counter.frame_count == number > 0
