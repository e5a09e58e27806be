"""Time of scaled_dot_product_attention by backend, forward and backward, at the sizes of one timestep."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.device import DEVICE, timed

# Rows, heads, queries, keys and head width.
SHAPES = {
    "MNIST, tokens": (128, 4, 28, 28, 32),
    "MNIST, slots": (128, 4, 28, 64, 32),
    "MNIST, readout": (1152, 4, 28, 28, 32),
    "WikiText-103, tokens": (64, 8, 64, 64, 64),
    "WikiText-103, slots": (64, 8, 64, 1024, 64),
    "WikiText-103, readout": (256, 8, 64, 64, 64),
}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each shape's name and measurement."""
    if DEVICE.type == "cuda" and not options.smoke:
        for name, shape in SHAPES.items():
            yield name, lambda shape=shape: measure(shape)


def measure(shape: tuple[int, int, int, int, int], calls: int = 50) -> dict[str, Any]:
    """Return the microseconds of one call, forward and backward, by backend; dropout 0.1, bfloat16."""
    rows, heads, num_queries, num_keys, width = shape
    query, key, value = (
        torch.randn(rows, length, heads, width, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for length in (num_queries, num_keys, num_keys)
    )
    grad = torch.randn_like(query)
    found: dict[str, Any] = {}
    for name, backend in BACKENDS.items():

        def work(*, backward: bool) -> None:
            for _ in range(calls):
                result = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1)
                if backward:
                    torch.autograd.grad(result, (query, key, value), grad)

        try:
            with sdpa_kernel([backend]):
                for backward in (False, True):
                    work(backward=backward)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        work(backward=backward)
                    graph.replay()
                    found[f"{name}, {'both' if backward else 'forward'}"] = round(
                        1e6 * min(timed(graph.replay) for _ in range(5)) / calls, 1
                    )
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:100]
    return found
