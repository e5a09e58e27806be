"""Softmax and sparse alternatives: entmax with alpha 1 (softmax), 1.5 (entmax15) and 2 (sparsemax).

p = argmax_p p.z + H_alpha(p), where H_alpha is the Tsallis entropy; p can be sparse for alpha > 1 (Peters et al., arXiv
1905.05702). The exact solution by sorting for alpha = 2 is from Martins and Astudillo (arXiv 1602.02068).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalizer = Literal["softmax", "entmax15", "sparsemax"]

# A score this far below the highest one gets weight 0 (exact for two scores; with more, a smaller gap is enough).
SUPPORT_WIDTH = {"softmax": float("inf"), "entmax15": 2.0, "sparsemax": 1.0}


def normalize_scores(scores: Float[Tensor, "*rows J"], normalizer: str) -> Float[Tensor, "*rows J"]:
    """Return weights over the last dimension that sum to 1; a score of -inf gets weight 0."""
    if normalizer == "softmax":
        return scores.softmax(dim=-1)
    return _Entmax.apply(scores, 1.5 if normalizer == "entmax15" else 2.0)


class _Entmax(torch.autograd.Function):
    # For per-sample gradients: the operators of both methods can be vectorized.
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, alpha: float) -> Tensor:
        # Adding a constant to all scores does not change the weights, and scores far below the highest get weight 0.
        z = (alpha - 1) * (scores - scores.amax(dim=-1, keepdim=True)).clamp(min=-1e3)
        ordered = z.sort(dim=-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        mean = ordered.cumsum(dim=-1) / count
        if alpha == 2.0:
            threshold = mean - 1 / count
        else:
            variance = (ordered.square().cumsum(dim=-1) / count - mean.square()).clamp(min=0)
            threshold = mean - (1 / count - variance).clamp(min=0).sqrt()
        size = (threshold < ordered).sum(dim=-1, keepdim=True).clamp(min=1)
        return (z - threshold.gather(-1, size - 1)).clamp(min=0) ** (1 / (alpha - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.alpha = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        # The inner `where` keeps 0 out of a power whose derivative there is infinite: second derivatives would be NaN.
        is_positive = weights > 0
        slope = torch.where(is_positive, torch.where(is_positive, weights, 1) ** (2 - ctx.alpha), 0)
        through = grad * slope
        return through - through.sum(dim=-1, keepdim=True) / slope.sum(dim=-1, keepdim=True) * slope, None
