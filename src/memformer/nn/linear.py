"""Linear layers that use oneDNN instead of MKL on a CPU where it is faster.

PyTorch computes float32 matrix products on x86 with MKL, which uses older instructions on processors not made by Intel.
There oneDNN, which is also part of PyTorch and is used by `torch.compile`, is up to twice as fast for products of about
a million multiplications or more; on Intel's processors MKL is faster (benchmarks/linear.py). The choice is by vendor,
not by a measurement at run time, so that the same run on the same machine gives the same bits. Results agree up to
rounding.
"""

import math
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.flop_counter import register_flop_formula

from memformer.utils.machine import has_intel_processor

# Operator that torch.compile emits for a linear layer on a CPU; PyTorch builds without oneDNN lack it.
_HAS_ONEDNN_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_USES_ONEDNN = _HAS_ONEDNN_LINEAR and not has_intel_processor()
# Smallest number of multiplications for which oneDNN is faster: each call has an overhead of 10 microseconds.
_LEAST_PRODUCTS = 1 << 20


if _HAS_ONEDNN_LINEAR:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        """Return the operations of the product, which `FlopCounterMode` would not count."""
        return 2 * math.prod(x) * int(weight[0])


class Linear(nn.Linear):
    """Subclass of `torch.nn.Linear` that computes its output with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map to the last dimension of the input."""
        return linear(input, self.weight, self.bias)


def part_of_output(projection: nn.Module, x: Tensor, outputs: slice, *, detached: bool = False) -> Tensor:
    """Return some of the outputs of a linear layer; only they are computed if the layer is a plain `Linear`.

    Any other module (an adapter around a layer, a layer with hooks, a parametrized or quantized layer) is called.

    Args:
        projection: The layer.
        x: Its input.
        outputs: The outputs to return.
        detached: Whether the layer's parameters get no gradient.
    """
    if type(projection) is not Linear or has_hooks(projection):
        if not detached:
            result: Tensor = projection(x)[..., outputs]
            return result
        return called_detached(projection, x)[..., outputs]
    weight = projection.weight[outputs]
    bias = None if projection.bias is None else projection.bias[outputs]
    if detached:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return linear(x, weight, bias)


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module has hooks that are called when it is, or when a gradient passes through it.

    Global hooks of all modules do not count: those of PyTorch's counter of operations would change what it counts.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def recompute_weights(module: nn.Module) -> None:
    """Compute what PyTorch's pruning and normalization hooks compute when a module is called, for one that is not."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
            hook(module, ())


def called_detached(module: nn.Module, x: Tensor) -> Tensor:
    """Return the module's output for x; its parameters get no gradient."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    result: Tensor = functional_call(module, parameters, (x,))
    return result


def called_in_dtype(projection: nn.Module, x: Tensor) -> Tensor:
    """Return the module's output for x, with its parameters and buffers converted to the dtype of x."""
    if type(projection) is Linear and projection.weight.dtype == x.dtype:  # as almost always
        return projection(x)
    converted = {
        name: tensor.to(x.dtype)
        for name, tensor in chain(projection.named_parameters(), projection.named_buffers())
        if tensor.is_floating_point() and tensor.dtype != x.dtype
    }
    result: Tensor = functional_call(projection, converted, (x,)) if converted else projection(x)
    return result


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
        _USES_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and x.ndim > 1
        # torch.compile chooses the library itself, and rejects this operator if weights may change. A compared size
        # would also become a condition on it.
        and not torch.compiler.is_compiling()
        and x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and not is_transformed()
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, (x, weight)))  # is_grads_batched of torch.autograd
    )


def is_transformed() -> bool:
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
        rows = grad.reshape(-1, grad.shape[-1])  # flatten does not take several gradients at once
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
