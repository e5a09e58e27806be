"""Tiny baselines, for properties that all of them must have."""

import torch

from memformer import (
    AssociativeRecurrentMemoryTransformerConfig,
    CompressiveTransformerConfig,
    LSTMConfig,
    RecurrentMemoryTransformerConfig,
    TransformerXLConfig,
    build_model,
)
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE

_ATTENTION = {"num_heads": 2, "d_ff": 24}

# Each model with options that change its computation.
BASELINES = {
    "lstm": (LSTMConfig, {}),
    "lstm, adaptive softmax": (LSTMConfig, {"adaptive_cutoffs": (4, 8)}),
    "transformer-xl": (TransformerXLConfig, {**_ATTENTION, "memory_length": 9}),
    "transformer-xl, short memory": (TransformerXLConfig, {**_ATTENTION, "memory_length": 2}),
    "transformer decoder": (TransformerXLConfig, {**_ATTENTION, "memory_length": 0}),
    "compressive": (
        CompressiveTransformerConfig,
        {**_ATTENTION, "memory_length": 6, "compressed_length": 4, "compression_rate": 2},
    ),
    # No length is a multiple of another, and a segment is longer than the memory.
    "compressive, uneven": (
        CompressiveTransformerConfig,
        {**_ATTENTION, "memory_length": 4, "compressed_length": 2, "compression_rate": 3},
    ),
    "compressive, mean": (
        CompressiveTransformerConfig,
        {**_ATTENTION, "memory_length": 5, "compressed_length": 3, "compression_rate": 2, "compression": "mean"},
    ),
    "recurrent memory": (RecurrentMemoryTransformerConfig, {**_ATTENTION, "num_memory_tokens": 3}),
    "recurrent memory, one token": (RecurrentMemoryTransformerConfig, {**_ATTENTION, "num_memory_tokens": 1}),
    "associative": (
        AssociativeRecurrentMemoryTransformerConfig,
        {**_ATTENTION, "num_memory_tokens": 3, "key_width": 2},
    ),
}
# One model of each type.
TYPES = ["lstm", "transformer-xl", "compressive", "recurrent memory", "associative"]


def tiny_baseline(name, seed=0, **changes):
    """Return a baseline small enough for float64 tests, in evaluation mode unless it has dropout."""
    config_class, fields = BASELINES[name]
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 16, "num_layers": 2, "segment_length": SEGMENT_LENGTH}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config_class(**{**sizes, **fields, **changes})).double()
        # Parameters that start at zero would hide a mistake in their use.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.norm() == 0:
                    parameter.normal_(std=0.3)
    return model.train(model.config.dropout > 0)


def tokens(batch_size, length, seed=2):
    return torch.randint(0, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def used_memory(model, batch_size):
    """Return a memory that has read tokens, more in some rows than in others."""
    memory = model.initial_memory(batch_size)
    with torch.no_grad():
        for row in range(batch_size):
            padding = torch.ones(batch_size, 5, dtype=torch.bool)
            padding[row, : 2 + row] = False
            for seed in range(row + 1):
                _, memory = model.encode(tokens(batch_size, 5, seed=10 + seed), memory=memory, padding_mask=padding)
    return memory.detach()
