"""Notices that the weights of a model have changed since something was computed with them."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements of a weight whose checksum takes a few microseconds.
_FEW = 4096


def identify_weights(model: nn.Module) -> list[tuple[int, ...]]:
    """Return what tells weights from others: where they are and, on a CPU, a checksum.

    Compiled code for a CPU holds the values. Fused optimizers and changes of `.data` leave no trace but these. On other
    devices it reads the weights where they are.
    """
    if next(model.parameters()).device.type != "cpu":
        return [(weight.data_ptr(),) for weight in model.parameters()]
    return [(weight.data_ptr(), weight._version, checksum_of(weight)) for weight in model.parameters()]


def checksum_of(weight: Tensor) -> int:
    """Return a checksum of the bytes of a weight on the CPU."""
    return zlib.crc32(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


class WeightsTrace:
    """Whether the weights are those of the last `accept`; fast enough to be asked before every token.

    It compares which tensors they are, where, and how often they were changed in place. Fused optimizers and changes of
    `.data` do not count as that: on a CPU, they are noticed by a checksum of a part of the first and last weight (of
    those that are trained, if any are). What a hook or a flag changes is not noticed.

    Args:
        model: The model, whose modules may change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._accepted = self._take()

    def has_changed(self) -> bool:
        """Return whether the weights have changed."""
        return self._take() != self._accepted

    def accept(self) -> None:
        """Take the weights as they are now for known."""
        self._accepted = self._take()

    def _take(self) -> list[Any]:
        weights = list(_weights(self._model))
        trace: list[Any] = [
            (id(weight), weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights
        ]
        ends = [weight for weight in weights if weight.requires_grad] or weights
        trace += [checksum_of(_beginning(weight)) for weight in (ends[0], ends[-1]) if weight.device.type == "cpu"]
        return trace


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights, some perhaps twice; in a tenth of the time of `parameters`, which also makes their names."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        for weight in module._parameters.values():
            if weight is not None:
                yield weight
        waiting += [child for child in module._modules.values() if child is not None]


def _beginning(weight: Tensor) -> Tensor:
    return weight.detach().reshape(-1)[:_FEW]
