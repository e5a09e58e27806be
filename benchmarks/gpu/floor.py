"""A floor for one update of a Memformer by the engine: operations, bytes, kernels and launches.

A product of a matrix (m, k) and weights (k, n) is 2 m k n operations and moves the elements m k + k n + m n once. With
gradient there are three such products, and the gradient of the weights is read and written once more, in float32. An
attention of q queries over j keys of width D is 4 q j D operations and moves 2 q D + 2 j D elements; with gradient, it
is three times the operations and three times the elements, in two kernels. All other operations (norms, activations,
sums, casts, dropout, logits and their softmax) are taken to be fused into these, at no cost.

The engine encodes every timestep twice, once with gradient, and reads it out once with gradient. The floor of a kernel
is the longer of its operations at the rate of the fastest matrix product and its bytes at the rate of the device's
memory. It is a guide: small tensors that stay in the cache move faster than that.

    python -m benchmarks.gpu --parts floor --output FOLDER
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.sizes import Size, sizes
from memformer import MemformerConfig
from memformer.training.pieces import chunks

# Of an H100: the fastest matrix product in results/gpu-speed.json, and the memory's rate in the data sheet.
OPERATIONS_PER_SECOND = 778e12
BYTES_PER_SECOND = 3.35e12
_BFLOAT16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class Work:
    """A matrix product or an attention, forward: its kernel, and those of its backward pass.

    Attributes:
        operations: Floating-point operations, forward.
        bytes_moved: Bytes, forward.
        gradient_bytes: Bytes read and written to add to the gradient of the weights.
        num_backward: Kernels of the backward pass, which take twice the operations and bytes of the forward pass.
    """

    operations: float
    bytes_moved: float
    gradient_bytes: float = 0.0
    num_backward: int = 2


@dataclass(frozen=True)
class Floor:
    """Lower bounds on the work of some kernels."""

    operations: float = 0.0
    bytes_moved: float = 0.0
    kernels: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(
            self.operations + other.operations,
            self.bytes_moved + other.bytes_moved,
            self.kernels + other.kernels,
            self.seconds + other.seconds,
        )


def floor(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each size's name and floor."""
    for name, size in sizes(smoke=options.smoke).items():
        yield name, partial(row, size)


def row(size: Size) -> dict[str, Any]:
    """Return the floor of one update."""
    found = floor_of_update(size)
    num_chunks = len(chunks(size.num_timesteps, size.readout_timesteps))
    return {
        "tflop": found.operations / 1e12,
        "gigabytes": found.bytes_moved / 1e9,
        "ms_of_operations": 1e3 * found.operations / OPERATIONS_PER_SECOND,
        "ms_of_bytes": 1e3 * found.bytes_moved / BYTES_PER_SECOND,
        "ms": 1e3 * found.seconds,
        "kernels": found.kernels,
        "graph_launches": 2 * size.num_timesteps + num_chunks,
    }


def floor_of_update(size: Size) -> Floor:
    """Return the floor of one update by the engine."""
    total = Floor()
    for work in encoding(size):
        total += times(size.num_timesteps, forward(work) + with_gradient(work))
    for part in chunks(size.num_timesteps, size.readout_timesteps):
        for work in readout(size, num_timesteps=part.stop - part.start):
            total += with_gradient(work)
    return total


def encoding(size: Size) -> list[Work]:
    """Return the work of one timestep, forward."""
    model = size.model
    width, rows, length, slots = model["d_model"], size.batch_size, model["segment_length"], model["num_slots"]
    tokens, memory = rows * length, rows * slots
    layer = [
        *transformer_layer(size, tokens, keys_per_row=length, rows=rows),
        *cross_attention(size, tokens, memory, rows),  # the memory reader
    ]
    writer = [  # in float32
        product(memory, width, 2 * width, size_of=_FLOAT32),  # queries, and keys of the slots for themselves
        product(tokens, width, 2 * width, size_of=_FLOAT32),
        attention(memory, length, width, rows, size_of=_FLOAT32),
    ]
    return model["num_encoder_layers"] * layer + writer


def readout(size: Size, *, num_timesteps: int) -> list[Work]:
    """Return the work of reading out some timesteps together, forward."""
    model = size.model
    width, rows, length = model["d_model"], num_timesteps * size.batch_size, model["segment_length"]
    tokens, num_layers = rows * length, model["num_decoder_layers"]
    config = size.config()
    assert isinstance(config, MemformerConfig)
    if config.decoder_attention == "joint":
        again = config.decoder_start_tokens - 1  # tokens of a row that are read again before the start
        keys_values = [product(tokens, width, 2 * width), product(rows * again, width, 2 * width)]
        layer = [*keys_values, *transformer_layer(size, tokens, keys_per_row=2 * length + again, rows=rows)]
        layer_again = transformer_layer(size, rows * again, keys_per_row=length + again, rows=rows)
        layers = num_layers * layer + (num_layers - 1) * layer_again  # of the last layer only keys and values are used
    else:
        layer = transformer_layer(size, tokens, keys_per_row=length, rows=rows)
        layers = num_layers * [*layer, *cross_attention(size, tokens, tokens, rows)]
    return [*layers, product(tokens, width, model["vocab_size"], writes=False)]


def transformer_layer(size: Size, tokens: int, *, keys_per_row: int, rows: int) -> list[Work]:
    """Return the work of self-attention and feed-forward."""
    width, d_ff = size.model["d_model"], size.model["d_ff"]
    return [
        product(tokens, width, 3 * width),  # queries, keys and values
        attention(tokens, keys_per_row, width, rows),
        product(tokens, width, width),
        product(tokens, width, d_ff),
        product(tokens, d_ff, width),
    ]


def cross_attention(size: Size, queries: int, keys: int, rows: int) -> list[Work]:
    """Return the work of an attention to other states."""
    width = size.model["d_model"]
    return [
        product(queries, width, width),
        product(keys, width, 2 * width),
        attention(queries, keys // rows, width, rows),
        product(queries, width, width),
    ]


def product(rows: int, inner: int, columns: int, *, size_of: int = _BFLOAT16, writes: bool = True) -> Work:
    """Return the work of a linear layer; the loss of a readout need not write its logits."""
    elements = rows * inner + inner * columns + (rows * columns if writes else 0)
    return Work(2.0 * rows * inner * columns, size_of * elements, gradient_bytes=2 * _FLOAT32 * inner * columns)


def attention(queries: int, keys_per_row: int, width: int, rows: int, *, size_of: int = _BFLOAT16) -> Work:
    """Return the work of an attention, given the queries of all rows."""
    elements = 2 * queries * width + 2 * rows * keys_per_row * width
    return Work(4.0 * queries * keys_per_row * width, size_of * elements, num_backward=1)


def forward(work: Work) -> Floor:
    """Return the floor of the forward pass."""
    return _floor(work.operations, work.bytes_moved, kernels=1)


def with_gradient(work: Work) -> Floor:
    """Return the floor of forward and backward pass."""
    backward = _floor(2 * work.operations, 2 * work.bytes_moved + work.gradient_bytes, kernels=work.num_backward)
    return forward(work) + backward


def times(number: int, each: Floor) -> Floor:
    """Return the floor of the same work several times."""
    return Floor(number * each.operations, number * each.bytes_moved, number * each.kernels, number * each.seconds)


def _floor(operations: float, bytes_moved: float, *, kernels: int) -> Floor:
    seconds = max(operations / OPERATIONS_PER_SECOND, bytes_moved / BYTES_PER_SECOND)
    return Floor(operations, bytes_moved, kernels, seconds)
