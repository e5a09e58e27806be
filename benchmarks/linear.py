"""Compare linear layers, forward and backward, between torch's matrix products (MKL on x86) and oneDNN.

    python benchmarks/linear.py          # table; JSON to benchmarks/results/linear.json

The two alternate in one process, and ratios compare the same round.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe_machine, positive
from torch import Tensor
from turns import in_words, spread, time_in_turns

from memformer.nn import linear as ours
from memformer.utils.files import write_json

# Rows, inputs and outputs, from a single token to a chunk of four thousand.
SHAPES = [
    *((rows, 256, 1024) for rows in (1, 4, 16, 64, 512, 1024, 4096)),
    *((rows, 1024, 256) for rows in (64, 512, 4096)),
    *((rows, 128, 128) for rows in (16, 64, 256, 2048)),
]


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--output", default="benchmarks/results/linear.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(shape, options.rounds) for shape in SHAPES]
    print("| rows x inputs x outputs | torch, GFLOP/s | oneDNN, GFLOP/s | oneDNN speed ratio |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {' x '.join(map(str, row['shape']))} | {row['torch_gflops']:.0f} | {row['onednn_gflops']:.0f} "
            f"| x{in_words(row['ratio'])} |"
        )
    result = {"machine": describe_machine(options.threads), "rounds": options.rounds, "rows": rows}
    write_json(Path(options.output), result)


def measure(shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Return the speed of both implementations, and their ratio."""
    rows, inner, columns = shape
    x, weight, grad = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)
    flops = 6 * rows * inner * columns
    repeats = max(1, int(2e8 / flops))

    def repeated(function: Callable[..., Tensor]) -> None:
        for _ in range(repeats):
            run(function, x, weight, grad)

    ours._USES_ONEDNN = True  # whatever this processor's vendor
    ours._LEAST_PRODUCTS, least = 0, ours._LEAST_PRODUCTS  # use oneDNN in the backward pass at any size
    works = {"torch": partial(repeated, F.linear), "onednn": partial(repeated, ours._OneDNNLinear.apply)}
    seconds = time_in_turns(works, rounds=rounds)
    ours._LEAST_PRODUCTS = least
    return {
        "shape": list(shape),
        "torch_gflops": flops * repeats / statistics.median(seconds["torch"]) / 1e9,
        "onednn_gflops": flops * repeats / statistics.median(seconds["onednn"]) / 1e9,
        "ratio": spread([base / own for base, own in zip(seconds["torch"], seconds["onednn"], strict=True)]),
    }


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Apply the layer, and differentiate with respect to input and weight."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.autograd.grad(function(x, weight, None), (x, weight), grad)


if __name__ == "__main__":
    main()
