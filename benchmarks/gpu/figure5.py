"""Figure 5 of the paper at its size: operations by length, device memory and time of an update by memory size."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import DEVICE, timed
from memformer import backpropagate
from memformer.reproduction.costs import (
    FULL_ATTENTION,
    MEMORY_SIZES,
    CostsScale,
    flops_of,
    memory_setting,
    read_costs,
    transformer_over,
)
from memformer.reproduction.measure import MethodSpec, Setting, build, growth_of_update
from memformer.reproduction.tables import tables_folder

Row = dict[str, Any]


def figure5(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield each measurement's name and function."""
    _, costs = read_costs(tables_folder() / "figure5", "paper")
    if options.smoke:
        costs = _tiny(costs)
    for length in costs.lengths:
        yield f"operations, {length:,} tokens", partial(operations, costs, length)
    for size in costs.memory_sizes:
        for model_type in costs.models:
            name = f"{model_type}, {MEMORY_SIZES[model_type]} {size:,}"
            yield name, partial(update, memory_setting(costs, model_type, size))


def operations(costs: CostsScale, length: int) -> Row:
    """Return the floating-point operations of each model for a sequence, in 10^9."""
    models = {FULL_ATTENTION: transformer_over(costs, length)}
    models |= {model_type: (model_type, model) for model_type, model in costs.models.items()}
    return {name: length * flops_of(*model, device=DEVICE.type) / 1e9 for name, model in models.items()}


def update(setting: Setting) -> Row:
    """Return by how much one update (forward and backward, operation by operation) grows the memory, and its time."""
    torch.set_float32_matmul_precision("high")
    model, rollout = build(replace(setting, device=DEVICE.type))
    growth = growth_of_update(model, rollout, MethodSpec("replay"))
    seconds = [timed(lambda: backpropagate(model, rollout)) for _ in range(3)]
    return {"memory_growth_mib": growth / 2**20, "ms": 1e3 * statistics.median(seconds)}


def _tiny(costs: CostsScale) -> CostsScale:
    """Return the measurements with tiny models."""
    tiny = {"d_model": 16, "num_heads": 2, "d_ff": 32, "segment_length": 8}
    own = {
        "memformer": {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_slots": 8},
        "transformer_xl": {"num_layers": 1, "memory_length": 8},
    }
    models = {model_type: {**model, **tiny, **own[model_type]} for model_type, model in costs.models.items()}
    return replace(costs, models=models, batch_size=2, lengths=[8, 64], memory_sizes=[8])
