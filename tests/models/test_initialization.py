"""The initial weights: a stack's residual stream keeps its variance near 1, and ARMT at first writes nothing."""

import pytest
import torch
from torch import nn

from memformer import AssociativeRecurrentMemoryTransformerConfig, Memformer, TransformerXLConfig, build_model
from tests.helpers import tiny_config

LARGE = {"d_model": 256, "num_heads": 4, "d_ff": 512}


# How many outputs of sub-layers are summed: those of 2 encoder layers, and of 2 decoder layers or 3 layers.
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Memformer(tiny_config(**LARGE)), {"encoder": 6, "decoder": 4}),
        (
            lambda: Memformer(tiny_config(**LARGE, decoder_attention="separate", decoder_start_tokens=0)),
            {"encoder": 6, "decoder": 6},
        ),
        (lambda: build_model(TransformerXLConfig(**LARGE, num_layers=3)), {"layers": 6}),
    ],
    ids=["joint", "separate", "transformer-xl"],
)
def test_outputs_are_scaled_by_the_number_of_their_sum(make, parts):
    checked = set()
    for name, module in make().named_modules():
        if isinstance(module, nn.Linear):
            stack = name.partition(".")[0]
            share = parts[stack] if name.endswith("output") and stack in parts else 1
            assert module.weight.std().item() == pytest.approx((module.in_features * share) ** -0.5, rel=0.05), name
            checked.add((stack, share))
    assert {(stack, share) for stack, share in parts.items()} <= checked


def test_an_associative_memory_writes_nothing_at_first():
    model = build_model(AssociativeRecurrentMemoryTransformerConfig(d_model=16, num_heads=2, d_ff=24, num_layers=2))
    assert len(model._typed_memories) == 2
    for memory in model._typed_memories:
        assert not memory.value.weight.any()
        assert memory.key.weight.any()
    assert torch.isfinite(model.memory_tokens).all()
