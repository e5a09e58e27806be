"""Linear maps, by the faster library where a CPU has two.

Torch's float32 matrix products on x86 come from MKL, which on processors not made by Intel keeps to older
instructions; oneDNN, which torch brings too and `torch.compile` uses, is then up to twice as fast from about a
million multiplications on (benchmarks/linear.py). Both agree to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# The operator that torch.compile emits for a linear map on a CPU; torch builds without oneDNN lack it.
_HAS_ONEDNN_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Multiplications from which on oneDNN is faster: a call takes it ten microseconds before it begins.
_LEAST_PRODUCTS = 1 << 20


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the map of the input's last dimension."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, as `torch.nn.functional.linear`; `torch.backends.mkldnn.enabled = False` keeps oneDNN out."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        result: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return result
    return _multiply(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and x.dtype == torch.float32 == weight.dtype
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _HAS_ONEDNN_LINEAR
        # torch.compile chooses the library itself, and refuses the operator where weights may change.
        and not torch.compiler.is_compiling()
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """Whether torch.func or a forward-mode derivative is at work: they know torch's own map alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _OneDNNLinear(torch.autograd.Function):
    """Torch gives the operator no gradient; here it is in terms of itself, so that it can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if needs_x else None,
            _multiply_transposed(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def _multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right; oneDNN copies what stands on its left, so that is the narrower of the two."""
    if left.shape[1] <= right.shape[1]:
        return linear(left.t(), right.t())
    return linear(right.t(), left.t()).t().contiguous()
