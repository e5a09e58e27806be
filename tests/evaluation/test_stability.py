"""How fast a small difference in the memory grows: known cases, and a comparison with the derivative."""

import math

import numpy as np
import pytest
import torch

from memformer import InputError
from memformer.data import corpus_from_arrays
from memformer.evaluation import stability
from memformer.evaluation.document_retention import measure_documents
from memformer.evaluation.stability import Stability, measure_stability
from memformer.models import LSTM
from memformer.models.baseline_configs import LSTMConfig
from tests.evaluation.corpora import documents
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model

SPEED = 0.25


def corpus_of(*num_segments):
    return corpus_from_arrays(documents([SEGMENT_LENGTH * count for count in num_segments]), VOCAB_SIZE)


def model_that_writes_nothing(**changes):
    """Return a model whose slots attend to themselves alone: their own score is far above that of any token."""
    model = tiny_model(forgetting_speeds=(SPEED, SPEED), **changes)
    with torch.no_grad():
        for projection in (model.memory_writer.query, model.memory_writer.key):
            projection.weight.copy_(100 * torch.eye(len(projection.weight)))
        model.encoder.norm.weight.mul_(0.1)  # tokens are shorter than slots
    return model


def test_a_slot_that_only_forgets_shrinks_its_changes_by_its_speed():
    # Near its initial state m = r u, m <- r (m + v) / ||m + v|| divides a change across u by 1 + ||v|| / r.
    found = measure_stability(model_that_writes_nothing(), corpus_of(60, 60))
    assert found.growth == pytest.approx(1 / (1 + SPEED), rel=1e-4)
    assert found.num_segments == 2 * (60 - 8)
    assert found.segments_to_double == pytest.approx(-math.log(2) / math.log(1 + SPEED), rel=1e-3)


def test_reading_ends_after_enough_segments(monkeypatch):
    monkeypatch.setattr(stability, "_MAX_SEGMENTS", 20)
    monkeypatch.setattr(stability, "_ROLLOUT_LENGTH", 8)
    assert measure_stability(tiny_model(), corpus_of(200)).num_segments == 24  # 8 of them in each of three rollouts


def test_a_slot_that_does_not_forget_keeps_its_changes():
    found = measure_stability(model_that_writes_nothing(forgetting=False), corpus_of(60))
    assert found.growth == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_growth_equals_that_of_the_derivative(temperature):
    model = tiny_model(write_temperature=temperature)
    (array,) = documents([SEGMENT_LENGTH * 60])
    found = measure_stability(model, corpus_from_arrays([array], VOCAB_SIZE))
    memory, segment = model.initial_memory(1), torch.tensor([[model.bos_token_id]])
    tangent, logarithms = torch.randn(memory.shape, dtype=memory.dtype), []
    for start in range(0, len(array), SEGMENT_LENGTH):
        tangent = tangent / tangent.norm()
        jacobian = torch.autograd.functional.jacobian(
            lambda memory, segment=segment: model.encode(segment, memory=memory)[1], memory
        )
        tangent = (jacobian.flatten(3) @ tangent.flatten()).view_as(memory)
        memory = model.encode(segment, memory=memory)[1].detach()
        logarithms.append(float(tangent.norm().log()))
        segment = torch.from_numpy(array[None, start : start + SEGMENT_LENGTH])
    assert found.growth == pytest.approx(math.exp(np.mean(logarithms[8:])), rel=0.02)


def test_padding_and_new_documents_are_not_counted():
    assert measure_stability(tiny_model(), corpus_of(9, 20, 3, 8), num_lanes=2).num_segments == (9 - 8) + (20 - 8)


def test_without_slots_or_with_short_documents_there_is_nothing_to_measure():
    lstm = LSTM(LSTMConfig(vocab_size=VOCAB_SIZE, d_model=16, segment_length=SEGMENT_LENGTH))
    assert measure_stability(tiny_model(num_slots=0), corpus_of(20)) is None
    assert measure_stability(lstm, corpus_of(20)) is None
    assert measure_stability(tiny_model(), corpus_of(8, 8)) is None
    assert measure_stability(tiny_model().bfloat16(), corpus_of(20)) is None


def test_documents_of_another_vocabulary_are_refused():
    with pytest.raises(InputError, match=f"vocabulary of {VOCAB_SIZE + 1} tokens, the model one of {VOCAB_SIZE}"):
        measure_stability(tiny_model(), corpus_from_arrays(documents([20]), vocab_size=VOCAB_SIZE + 1))


def test_a_change_that_is_gone_at_once_has_growth_0():
    model = tiny_model()
    with torch.no_grad():
        model.memory_writer.value.weight.zero_()
        model.memory_writer.key.weight.copy_(-100 * torch.eye(16))
        model.memory_writer.query.weight.copy_(100 * torch.eye(16))
        model.encoder.norm.weight.mul_(0.1)
    assert measure_stability(model, corpus_of(20)).growth == 0


def test_the_line_says_whether_a_change_doubles_or_is_halved():
    assert "x1.189 a segment: it doubles in 4.0 segments" in Stability(growth=2**0.25, num_segments=9).to_line()
    assert "x0.500 a segment: it is halved in 1.0 segments" in Stability(growth=0.5, num_segments=9).to_line()
    assert "x1.000 a segment: it stays as large" in Stability(growth=1.0, num_segments=9).to_line()
    assert "x0.000 a segment: it is halved in 0.0 segments" in Stability(growth=0.0, num_segments=9).to_line()


def test_document_retention_reports_it():
    model, corpus = tiny_model(), corpus_of(20, 20)
    result = measure_documents(model, corpus)
    expected = measure_stability(model, corpus)
    assert result.to_dict()["stability"] == expected.to_dict()
    assert expected.to_line() in result.to_table()
    short = measure_documents(model, corpus_of(4))
    assert short.to_dict()["stability"] is None
    assert "small change" not in short.to_table()
