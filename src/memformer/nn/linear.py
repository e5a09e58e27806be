"""Linear layers that use oneDNN instead of MKL on a CPU where it is faster.

PyTorch computes float32 matrix products on x86 with MKL, which uses older instructions on processors not made by Intel.
There oneDNN, which is also part of PyTorch and is used by `torch.compile`, is up to twice as fast for products of about
a million multiplications or more (benchmarks/linear.py). Results agree up to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# Operator that torch.compile emits for a linear layer on a CPU; PyTorch builds without oneDNN lack it.
_HAS_ONEDNN_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Smallest number of multiplications for which oneDNN is faster: each call has an overhead of 10 microseconds.
_LEAST_PRODUCTS = 1 << 20


class Linear(nn.Linear):
    """Subclass of `torch.nn.Linear` that computes its output with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map to the last dimension of the input."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, like `torch.nn.functional.linear`; `torch.backends.mkldnn.enabled = False` disables oneDNN."""
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
        # torch.compile chooses the library itself, and rejects this operator if weights may change.
        and not torch.compiler.is_compiling()
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active: they support only PyTorch's own operator."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _OneDNNLinear(torch.autograd.Function):
    """Gradient of the oneDNN operator, which PyTorch lacks; it calls `linear`, so it can be differentiated again."""

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
    """Return left^T right; oneDNN copies its left operand, so the narrower matrix is put there."""
    if left.shape[1] <= right.shape[1]:
        return linear(left.t(), right.t())
    return linear(right.t(), left.t()).t().contiguous()
