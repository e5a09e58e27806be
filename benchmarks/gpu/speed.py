"""Speed and device memory of one update (forward and backward, without optimizer) by method, on one GPU."""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.device import DEVICE, reserved_mib, synchronize, timed
from benchmarks.gpu.peers import gpt2_flops_per_token, gpt2_of_size
from benchmarks.gpu.sizes import Size, sizes
from memformer import backpropagate
from memformer.evaluation.flops import flops_per_token
from memformer.training.engine import ReplayEngine

METHODS = ("bptt", "replay, eager", "replay, engine", "replay, engine, compiled")
Row = dict[str, Any]


def speed(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield each measurement's name and function: the fastest matrix product, then each size with all methods."""
    yield "peak", lambda: {"tflops": peak_tflops(64 if options.smoke else 8192)}
    all_sizes, number = sizes(smoke=options.smoke), 1 if options.smoke else 5
    for name, size in all_sizes.items():
        for method in (*METHODS, *(["checkpoint"] if "Table 3" in name else [])):
            if DEVICE.type == "cuda" or "compiled" not in method:
                yield f"{name}: {method}", partial(measure, size, method, num_updates=number)


def peers(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the name and function of each measurement of Transformer-XL, and then of GPT-2."""
    all_sizes, number = sizes(smoke=options.smoke), 1 if options.smoke else 5
    for name, size in all_sizes.items():
        if size.peer_layers:
            peer = size.transformer_xl()
            for method in ("bptt", "replay, engine"):
                yield f"{name}: {peer.title()}: {method}", partial(measure, peer, method, num_updates=number)
    for name, size in all_sizes.items():
        if size.peer_layers:
            for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
                label = f"{name}: GPT-2, {size.peer_layers} layers, {size.num_timesteps} segments at once"
                yield (
                    label + (", compiled" if compiled else ""),
                    partial(measure_gpt2, size, num_updates=number, compiled=compiled),
                )


def peak_tflops(width: int) -> float:
    """Return the rate of a large bfloat16 matrix product on random data, in 10^12 operations per second."""
    left, right = (torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: left @ right) for _ in range(10))
    return 2 * width**3 / seconds / 1e12


def measure(size: Size, method: str, *, num_updates: int) -> Row:
    """Return time, tokens/s, useful operations and memory of one update of one of our models."""
    torch.set_float32_matmul_precision("high")
    model, rollout = size.build(DEVICE), size.rollout()
    _prepare_gradients(model)
    on_device = rollout.to(DEVICE)
    memory = model.initial_memory(size.batch_size).detach()
    said: list[str] = []
    engine = ReplayEngine(model, say=said.append)
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

    row = measure_update(update, num_updates=num_updates)
    return _with_rates(row, size, flops_per_token(model)) | {"said": said}


def measure_gpt2(size: Size, *, num_updates: int, compiled: bool) -> Row:
    """Return the same of a GPT-2 that attends to all tokens of a rollout, which it reads at once."""
    if importlib.util.find_spec("transformers") is None:
        return {"missing": "transformers is not installed"}
    torch.set_float32_matmul_precision("high")
    model, length = gpt2_of_size(size), size.num_timesteps * int(size.model["segment_length"])
    _prepare_gradients(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, size.model["vocab_size"], (size.batch_size, length), generator=generator).to(DEVICE)
    if compiled:
        torch._dynamo.reset()
        model.compile()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def update() -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    return _with_rates(measure_update(update, num_updates=num_updates), size, gpt2_flops_per_token(size))


def measure_update(update: Callable[[], None], *, num_updates: int) -> Row:
    """Return the times and the growth of device memory of an update; the first one compiles and records."""
    before = reserved_mib()
    started = time.perf_counter()
    update()
    synchronize()
    set_up = time.perf_counter() - started
    held = reserved_mib()  # with graphs, their memory
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0
    update()
    if DEVICE.type == "cuda":
        peak_mib = held + torch.cuda.max_memory_allocated() / 2**20 - allocated
    seconds = [timed(update) for _ in range(num_updates)]
    row = {"ms": 1e3 * statistics.median(seconds), "ms_lowest": 1e3 * min(seconds), "set_up_seconds": set_up}
    if DEVICE.type == "cuda":
        # Weights and their gradients are not included; what graphs keep for themselves is.
        row["memory_growth_mib"] = peak_mib - before
    return row


def _with_rates(row: Row, size: Size, flops: float) -> Row:
    seconds = row["ms"] / 1e3
    rates = {
        "tokens_per_second": size.num_tokens / seconds,
        "useful_tflops": 3 * flops * size.num_tokens / seconds / 1e12,
    }
    return row | rates


def _prepare_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
