"""Where the time of the engine's recorded pieces goes, by kind of kernel."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.device import DEVICE
from benchmarks.gpu.sizes import Size, sizes
from memformer.training.engine import ReplayEngine

KINDS = {
    "attention": ("sdpa", "flash", "fmha", "attention"),  # first: some are made with cutlass, too
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "layer norm": ("layer_norm", "gammabeta", "layernorm"),
    "softmax": ("softmax", "nll_loss"),
    "compiled": ("triton_",),
    "dropout": ("dropout", "distribution"),
    "copies and casts": ("copy", "catarray", "cast", "memcpy", "memset", "roll"),
    "reductions": ("reduce",),
    "indexing": ("index", "gather", "scatter", "embedding"),
    "sums of gradients": ("multi_tensor",),
    "elementwise": ("elementwise",),
}


def kernels(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each measurement's name and function."""
    for name, size in sizes(smoke=options.smoke).items() if DEVICE.type == "cuda" else ():
        for compiled in () if "horizon" in name else (False, True):
            label = f"{name}, compiled" if compiled else name
            yield label, partial(measure, size, compiled=compiled)


def measure(size: Size, *, compiled: bool) -> dict[str, Any]:
    """Return the milliseconds of one update by kind of kernel, and the slowest kernels."""
    torch.set_float32_matmul_precision("high")
    model, rollout = size.build(DEVICE), size.rollout()
    memory = model.initial_memory(size.batch_size).detach()
    if compiled:
        torch._dynamo.reset()
        model.compile()  # type: ignore[no-untyped-call]  # torch does not annotate it
    engine = ReplayEngine(model)

    def update() -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            engine.backpropagate(rollout, memory=memory, readout_timesteps=size.readout_timesteps)

    update()
    update()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        update()
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    launches = 0
    for event in recorded.key_averages():
        milliseconds = event.self_device_time_total / 1e3
        if milliseconds <= 0:
            continue
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        kinds[kind] += milliseconds
        kernels[event.key[:90]] += milliseconds
        launches += event.count
    return {
        "kernels": launches,
        "ms": {kind: round(value, 2) for kind, value in kinds.most_common()},
        "slowest": [(name, round(value, 2)) for name, value in kernels.most_common(14)],
    }
