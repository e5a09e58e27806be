"""Notices that the weights of a model have changed since something was computed with them."""

import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memformer.utils.modules import modules_inside

# Elements of a weight that are compared before every token.
_FEW = 1024


def identify_weights(model: nn.Module) -> list[tuple[int, ...]]:
    """Return what tells weights from others: where they are and, on a CPU, a checksum.

    Compiled code for a CPU holds the values. Fused optimizers and changes of `.data` leave no trace but these. On other
    devices it reads the weights where they are.
    """
    weights = list(model.parameters())
    if weights[0].device.type != "cpu":
        return [(weight.data_ptr(),) for weight in weights]
    versions = versions_of(weights)
    return [
        (weight.data_ptr(), version, checksum_of(weight)) for weight, version in zip(weights, versions, strict=True)
    ]


def checksum_of(weight: Tensor) -> int:
    """Return a checksum of the bytes of a weight on the CPU.

    It is the CRC of the sums of all rows and of all columns, whose elements are taken as 64-bit integers: ten times as
    fast as the CRC of the bytes. Only a change that leaves all these sums as they are is not noticed.
    """
    content = weight.detach().reshape(-1).view(torch.uint8).numpy()
    num_rows = max(weight.shape[:1].numel(), 1)
    if content.nbytes % (8 * num_rows):
        return zlib.crc32(content.data)
    integers = content.view(np.int64).reshape(num_rows, -1)
    return zlib.crc32(integers.sum(axis=1).data, zlib.crc32(integers.sum(axis=0).data))


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """Return how often each weight was changed in place; 0 if it was made in inference mode, which does not count."""
    try:
        return [weight._version for weight in weights]
    except RuntimeError:
        return [0 if weight.is_inference() else weight._version for weight in weights]


class WeightsTrace:
    """Whether the weights are those of the last `accept`; fast enough to be asked before every token.

    It compares the modules, which tensors their weights are, and how often those were changed in place. Fused
    optimizers and changes of `.data` do not count as that: on a CPU, they are noticed by the first elements of the
    first and the last weight (of those that are trained, if any are). What a hook or a flag changes is not noticed.

    Args:
        model: The model, whose modules may change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.accept()

    def accept(self) -> None:
        """Remember the weights as they are now."""
        self._modules = modules_inside(self._model)
        self._places = [module._parameters for module in (self._model, *self._modules)]
        self._accepted = self._take()

    def has_changed(self) -> bool:
        """Return whether the weights have changed."""
        return modules_inside(self._model) is not self._modules or self._take() != self._accepted

    def _take(self) -> list[Any]:
        found = chain.from_iterable([place.values() for place in self._places])
        weights = [weight for weight in found if weight is not None]
        trace: list[Any] = [*map(id, weights), *versions_of(weights)]
        for order in (weights, weights[::-1]):
            end = next((weight for weight in order if weight.requires_grad), order[0])
            if end.device.type == "cpu":
                trace.append(end.detach().reshape(-1)[:_FEW].view(torch.uint8).numpy().tobytes())
        return trace
