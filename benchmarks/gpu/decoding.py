"""Generation and reading on a GPU, by the number of tokens read before."""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import DEVICE, synchronize
from benchmarks.gpu.peers import gpt2, mamba, rwkv
from memformer import Memformer, MemformerConfig, Session
from memformer.models.presets import PAPER_DECODER

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
CONFIG = {
    "vocab_size": 256,
    "d_model": 512,
    "num_heads": 8,
    "d_ff": 2048,
    "num_encoder_layers": 4,
    "num_decoder_layers": 12,
    "segment_length": 128,
    "num_slots": 64,
}


def decoding(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each measurement's name and function."""
    changes = {"d_model": 16, "d_ff": 32, "num_heads": 2, "segment_length": 8, "num_slots": 4} if options.smoke else {}
    lengths = (20, 40) if options.smoke else LENGTHS
    default = MemformerConfig(**{**CONFIG, **changes})
    config = replace(default, **PAPER_DECODER)
    if importlib.util.find_spec("transformers") and DEVICE.type == "cuda" and not options.smoke:
        for length in lengths[:3]:
            for recorded in (False, True):
                name = f"GPT-2{', one CUDA graph' if recorded else ''}, 1 row after {length:,} tokens"
                yield name, lambda length=length, recorded=recorded: gpt2(length, recorded=recorded)
        yield "Mamba, 1 row", mamba
        yield "RWKV-4, 1 row", rwkv
    for batch_size in (1, 32):
        for length in lengths:
            if length * batch_size <= max(lengths):
                name = f"memformer, {batch_size} rows after {length:,} tokens"
                yield name, partial(measure, config, batch_size, length, num_tokens=8 if options.smoke else 256)
    for batch_size in (1, 32):
        yield (
            f"memformer, the default's decoder, {batch_size} rows after {lengths[0]:,} tokens",
            partial(measure, default, batch_size, lengths[0], num_tokens=8 if options.smoke else 256),
        )
    if DEVICE.type == "cuda":
        yield (
            f"memformer compiled, 1 rows after {lengths[0]:,} tokens",
            lambda: measure(config, 1, lengths[0], compiled=True),
        )


def measure(
    config: MemformerConfig, batch_size: int, length: int, *, compiled: bool = False, num_tokens: int = 256
) -> dict[str, Any]:
    """Return the milliseconds per generated token, the tokens read per second and the bytes of state."""
    torch.manual_seed(0)
    session = Session(Memformer(config).to(DEVICE).eval(), batch_size=batch_size, compiled=compiled)
    tokens = torch.randint(0, config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))
    warm_up = 4 * config.segment_length
    session.feed(tokens[:, :warm_up])
    session.generate(2, temperature=0)
    synchronize()
    started = time.perf_counter()
    session.feed(tokens[:, warm_up:])
    synchronize()
    reading = time.perf_counter() - started
    session.generate(num_tokens, temperature=0)
    synchronize()
    started = time.perf_counter()
    session.generate(num_tokens, temperature=0)
    synchronize()
    seconds = time.perf_counter() - started
    return {
        "ms_per_token": 1e3 * seconds / num_tokens,
        "tokens_read_per_second": batch_size * max(length - warm_up, 0) / reading,
        "state_bytes": session.state_bytes,
    }
