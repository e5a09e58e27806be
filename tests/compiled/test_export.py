"""torch.export captures reading and predicting with a batch size that stays open."""

import pytest
import torch

from tests.helpers import VOCAB_SIZE, assert_close, tiny_model
from tests.models.baselines import tiny_baseline

# torch.export emits warnings about torch's own code.
pytestmark = pytest.mark.filterwarnings("default")


class Encode(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, segment, memory):
        return self.model.encode(segment, memory=memory)


@pytest.mark.parametrize("make", [lambda: tiny_model(d_model=128, d_ff=256), lambda: tiny_baseline("recurrent memory")])
def test_an_exported_timestep_equals_the_model_for_any_number_of_rows(make):
    """Sizes are not compared where tensors are traced, so the batch is not limited to a part of its range."""
    model = make().float().eval()

    def inputs(rows):
        return torch.randint(0, VOCAB_SIZE, (rows, 6)), model.initial_memory(rows).detach().clone()

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Encode(model), inputs(3), dynamic_shapes=({0: rows}, {0: rows}))
    for count in (2, 64):
        segment, memory = inputs(count)
        for actual, expected in zip(
            program.module()(segment, memory), model.encode(segment, memory=memory), strict=True
        ):
            assert_close(actual, expected, relative=1e-6)
