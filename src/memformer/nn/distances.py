"""Transformer-XL's relative positions: attention scores are a content term plus a distance term."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.nn.linear import Linear
from memformer.nn.positions import Frame, fused_attention, sinusoids


class DistanceFrame(Frame):
    """Causal attention: softmax(((Q + u) K^T + (Q + v) R^T) / sqrt(D/H)) V, with a vector R for each distance.

    The queries belong to the last Q of the J tokens that the keys belong to, so distances are at most J-1. Keys after
    a query are masked.

    Args:
        vectors: R for the distances J-1 .. 0, for each head.
        content_bias: u.
        distance_bias: v.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "H J E"],
        *,
        content_bias: Float[Tensor, "H E"],
        distance_bias: Float[Tensor, "H E"],
    ) -> None:
        self.vectors = vectors
        self.content_bias = content_bias
        self.distance_bias = distance_bias

    def attend(
        self,
        query: Float[Tensor, "B H Q E"],
        key: Float[Tensor, "B H J E"],
        value: Float[Tensor, "B H J W"],
        *,
        keep_mask: Bool[Tensor, "#B 1 #Q J"] | None = None,
        is_causal: bool = True,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H Q W"]:
        """Return the attention output of each query over the keys up to its own token; `is_causal` has no effect."""
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        by_distance = (query + self.distance_bias[:, None].to(query.dtype)) @ self.vectors.to(query.dtype).mT
        # Relative shift (arXiv 1901.02860, appendix B): the scores of a query k tokens before the last one belong k
        # columns further left. Padding rows with one column and reshaping shifts each row by one more than the next.
        shifted = F.pad(by_distance, (1, 0)).flatten(-2)[..., num_queries:].unflatten(-1, (num_queries, num_keys))
        keep = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        keep = keep[None, None] if keep_mask is None else keep & keep_mask
        scores = (shifted / math.sqrt(query.shape[-1])).masked_fill(~keep, torch.finfo(query.dtype).min)
        query = query + self.content_bias[:, None].to(query.dtype)
        return fused_attention(query, key, value, mask=scores, dropout=dropout)


class Distances(nn.Module):
    """Learned parameters of Transformer-XL's relative positions for one layer (arXiv 1901.02860, section 3.3).

    R is a linear map of the sinusoids of the distance. Every layer has its own map, u and v.

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
    """

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.projection = Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, width // num_heads))
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, width // num_heads))

    def forward(self, sines: Float[Tensor, "J D"]) -> DistanceFrame:
        """Return the layer's frame; `sines` are the sinusoids of the distances J-1 .. 0, shared by all layers."""
        vectors = self.projection(sines).unflatten(-1, self.content_bias.shape).transpose(0, 1)
        return DistanceFrame(vectors, content_bias=self.content_bias, distance_bias=self.distance_bias)


def descending_sinusoids(num_keys: int, *, width: int, like: Tensor) -> Float[Tensor, "J D"]:
    """Return the sinusoids of the distances J-1 .. 0, on the device and in the dtype of `like`."""
    distances = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoids(distances, width=width).to(like.dtype)
