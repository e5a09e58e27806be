"""The gradients of a model's parameters in tensors that stay the same, as recorded pieces need them."""

import torch
from torch import Tensor

from memformer.models.recurrence import RecurrentModel


class Gradients:
    """The gradient of every parameter, in tensors that stay the same.

    Attributes:
        reached: Indices of the parameters to which `add` has added something since this was set.
    """

    def __init__(self, model: RecurrentModel) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tensors = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._absent: list[int] = []
        self.reached: set[int] = set()

    def attach(self) -> None:
        """Make these tensors the `.grad` of the parameters, with the values of their present `.grad` (None: 0)."""
        self._absent = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        for parameter, tensor in zip(self.parameters, self._tensors, strict=True):
            if parameter.grad is not None and parameter.grad is not tensor:
                tensor.copy_(parameter.grad)
            parameter.grad = tensor
        if self._absent:
            torch._foreach_zero_([self._tensors[index] for index in self._absent])

    def detach_unreached(self) -> None:
        """Set the `.grad` of parameters back to None if it was None at `attach`, and the loss does not depend on them.

        An optimizer leaves such parameters as they are, but it would decay one with a gradient of zero. Calling it
        again before the next `attach` changes nothing.
        """
        for index in self._absent:
            if index not in self.reached:
                self.parameters[index].grad = None
        self._absent = []

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Add to the gradients of the parameters, in their order; None adds nothing."""
        given = [(index, grad) for index, grad in enumerate(gradients) if grad is not None]
        if given:
            self.reached.update(index for index, _ in given)
            torch._foreach_add_([self._tensors[index] for index, _ in given], [grad for _, grad in given])

    def copy(self) -> list[Tensor]:
        """Return a copy of the values, to be given to `restore`."""
        return [tensor.clone() for tensor in self._tensors]

    def restore(self, values: list[Tensor]) -> None:
        """Set the values to those that `copy` returned."""
        if values:
            torch._foreach_copy_(self._tensors, values)
