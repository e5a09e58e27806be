"""Notices that the weights of a model have changed since something was computed with them."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

# Elements of a weight whose checksum takes a few microseconds.
_FEW = 1024


def identify_weights(model: nn.Module) -> list[tuple[int, ...]]:
    """Return what tells weights from others: where they are and, on a CPU, a checksum.

    Compiled code for a CPU holds the values. Fused optimizers and changes of `.data` leave no trace but these. On other
    devices it reads the weights where they are.
    """
    if next(model.parameters()).device.type != "cpu":
        return [(weight.data_ptr(),) for weight in model.parameters()]
    return [(weight.data_ptr(), version_of(weight), checksum_of(weight)) for weight in model.parameters()]


def version_of(weight: Tensor) -> int:
    """Return how often a weight was changed in place; 0 if it was made in inference mode, where that is not counted."""
    return 0 if weight.is_inference() else weight._version


def checksum_of(weight: Tensor) -> int:
    """Return a checksum of the bytes of a weight on the CPU."""
    return zlib.crc32(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


class WeightsTrace:
    """Whether the weights are those of the last `accept`; fast enough to be asked before every token.

    It compares the modules, which tensors their weights are, and how often those were changed in place. Fused
    optimizers and changes of `.data` do not count as that: on a CPU, they are noticed by a checksum of a part of the
    first and the last weight (of those that are trained, if any are). What a hook or a flag changes is not noticed.

    Args:
        model: The model, whose modules may change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.accept()

    def accept(self) -> None:
        """Remember the weights as they are now."""
        modules = list(self._model.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in modules]
        # Where the weights are looked up, which is several times as fast as `parameters`.
        self._places = [(module._parameters, name) for module in modules for name in module._parameters]
        self._accepted = self._take()

    def has_changed(self) -> bool:
        """Return whether the weights have changed."""
        is_rebuilt = any(tuple(children.values()) != known for children, known in self._children)
        return is_rebuilt or self._take() != self._accepted

    def _take(self) -> list[Any]:
        found = [weights.get(name) for weights, name in self._places]
        weights = [weight for weight in found if weight is not None]
        trace: list[Any] = [(id(weight), version_of(weight)) for weight in weights]
        for order in (weights, weights[::-1]):
            end = next((weight for weight in order if weight.requires_grad), order[0])
            if end.device.type == "cpu":
                trace.append(checksum_of(end.detach().reshape(-1)[:_FEW]))
        return trace
