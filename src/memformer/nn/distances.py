"""Transformer-XL's relative positions: attention scores with a part for content and a part for distance."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.nn.linear import Linear
from memformer.nn.positions import Frame, sinusoids


class DistanceFrame(Frame):
    """Causal attention: softmax(((Q + u) K^T + (Q + v) R^T) / sqrt(D/H)) V, with a vector R for each distance.

    The queries are the last tokens of those that the keys belong to, so a query and a key are never further apart than
    there are keys; what comes after a query has no vector, and is not looked at.

    Args:
        vectors: R of the distances J-1 .. 0, for each head.
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
        """Return what each query reads of the keys up to itself; `is_causal` changes nothing."""
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        by_distance = (query + self.distance_bias[:, None].to(query.dtype)) @ self.vectors.to(query.dtype).mT
        # A query that stands k tokens before the last needs its scores k places further left. Read as rows that are
        # one longer, and so one place off from row to row, they are all there (arXiv 1901.02860, appendix B).
        shifted = F.pad(by_distance, (1, 0)).flatten(-2)[..., num_queries:].unflatten(-1, (num_queries, num_keys))
        keep = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        keep = keep[None, None] if keep_mask is None else keep & keep_mask
        scores = (shifted / math.sqrt(query.shape[-1])).masked_fill(~keep, torch.finfo(query.dtype).min)
        query = query + self.content_bias[:, None].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=scores, dropout_p=dropout)


class Distances(nn.Module):
    """The learned part of Transformer-XL's relative positions, for one layer (arXiv 1901.02860, section 3.3).

    R is a linear map of the sinusoids of the distance. Every layer has its own map and its own u and v.

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
        """Return the layer's frame; `sines` are those of the distances J-1 .. 0, the same for every layer."""
        vectors = self.projection(sines).unflatten(-1, self.content_bias.shape).transpose(0, 1)
        return DistanceFrame(vectors, content_bias=self.content_bias, distance_bias=self.distance_bias)


def descending_sinusoids(num_keys: int, *, width: int, like: Tensor) -> Float[Tensor, "J D"]:
    """Return the sinusoids of the distances J-1 .. 0, with the dtype and the device of `like`."""
    distances = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoids(distances, width=width).to(like.dtype)
