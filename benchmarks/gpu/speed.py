"""Speed and device memory of one update (forward and backward, without optimizer) by method, on one GPU."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.sizes import Size, sizes
from memformer import backpropagate
from memformer.evaluation.flops import flops_per_token
from memformer.training.engine import ReplayEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = ("bptt", "replay, eager", "replay, engine", "replay, engine, compiled")


def speed(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each measurement's name and function."""
    yield "peak", lambda: {"tflops": peak_tflops(64 if options.smoke else 8192)}
    for name, size in sizes(smoke=options.smoke).items():
        for method in METHODS:
            if DEVICE.type == "cpu" and "compiled" in method:
                continue
            yield f"{name}: {method}", lambda size=size, method=method: measure(size, method)


def peak_tflops(width: int) -> float:
    """Return the rate of a large bfloat16 matrix product on random data, in 10^12 operations per second."""
    left, right = (torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: left @ right) for _ in range(10))
    return 2 * width**3 / seconds / 1e12


def measure(size: Size, method: str) -> dict[str, Any]:
    """Return time, tokens/s, useful operations and memory of one update."""
    torch.set_float32_matmul_precision("high")
    model, rollout = size.build(DEVICE), size.rollout()
    operations = 3 * flops_per_token(model) * size.num_tokens
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    on_device = rollout.to(DEVICE)
    memory = model.initial_memory(size.batch_size).detach()
    said: list[str] = []
    engine = ReplayEngine(model, say=said.append)
    started = time.perf_counter()
    if "compiled" in method:
        torch._dynamo.reset()
        model.compile()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def update() -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            if "engine" in method:
                engine.backpropagate(rollout, memory=memory, readout_timesteps=size.readout_timesteps)
            else:
                kind = method.partition(",")[0]
                backpropagate(model, on_device, memory=memory, method=kind, readout_timesteps=size.readout_timesteps)

    before = reserved_mib()
    update()
    set_up = time.perf_counter() - started
    held = reserved_mib()  # with graphs, their memory
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0
    update()
    if DEVICE.type == "cuda":
        peak_mib = held + torch.cuda.max_memory_allocated() / 2**20 - allocated
    seconds = [timed(update) for _ in range(10 if "engine" in method else 2)]
    typical = statistics.median(seconds)
    row = {
        "ms": 1e3 * typical,
        "ms_lowest": 1e3 * min(seconds),
        "tokens_per_second": size.num_tokens / typical,
        "useful_tflops": operations / typical / 1e12,
        "set_up_seconds": set_up,
        "said": said,
    }
    if DEVICE.type == "cuda":
        # Weights and their gradients are not included; what graphs keep for themselves is.
        row["memory_growth_mib"] = peak_mib - before
    return row


def reserved_mib() -> float:
    """Return the device memory that torch holds, without what it holds in reserve."""
    if DEVICE.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes on the device."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
