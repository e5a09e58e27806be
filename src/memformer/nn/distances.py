"""Transformer-XL's relative positions: attention scores are a content term plus a distance term."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.nn.linear import Linear
from memformer.nn.positions import Frame, fused_attention, sinusoids

KeepMask = Bool[Tensor, "#B 1 #Q J"]


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
        keep_mask: KeepMask | None = None,
        is_causal: bool = True,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H Q W"]:
        """Return the attention output of each query over the keys up to its own token; `is_causal` has no effect."""
        biased = (query + self.distance_bias[:, None].to(query.dtype)).transpose(0, 1)  # (H, B, Q, E)
        by_distance = biased.flatten(1, 2) @ self.vectors.to(query.dtype).mT  # so vectors are not copied for each row
        by_distance = by_distance.unflatten(1, biased.shape[1:3]).transpose(0, 1)
        scores, keep_mask = self._by_key(by_distance, num_keys=key.shape[-2], keep_mask=keep_mask)
        scores = (scores / math.sqrt(query.shape[-1])).masked_fill(~keep_mask, torch.finfo(query.dtype).min)
        query = query + self.content_bias[:, None].to(query.dtype)
        return fused_attention(query, key, value, mask=scores, dropout=dropout)

    def _by_key(
        self, by_distance: Float[Tensor, "B H Q L"], *, num_keys: int, keep_mask: KeepMask | None
    ) -> tuple[Float[Tensor, "B H Q J"], KeepMask]:
        """Return the score of each query and key from those of all distances, and the mask without keys after a query.

        Relative shift (arXiv 1901.02860, appendix B): the scores of a query k tokens before the last one belong k
        columns further left. Padding rows with one column and reshaping shifts each row by one more than the next.
        """
        num_queries = by_distance.shape[-2]
        shifted = F.pad(by_distance, (1, 0)).flatten(-2)[..., num_queries:].unflatten(-1, (num_queries, num_keys))
        keep = torch.ones(num_queries, num_keys, dtype=torch.bool, device=shifted.device).tril(num_keys - num_queries)
        return shifted, keep[None, None] if keep_mask is None else keep & keep_mask


class CachedDistanceFrame(DistanceFrame):
    """The same attention to cached keys: the queries of each row have places of their own.

    The mask that `attend` is given must leave out the keys after a query.

    Args:
        vectors: R for the distances L-1 .. 0, for each head.
        content_bias: u.
        distance_bias: v.
        numbers: Number of the vector of each query and key.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "H L E"],
        *,
        content_bias: Float[Tensor, "H E"],
        distance_bias: Float[Tensor, "H E"],
        numbers: Int64[Tensor, "B 1 Q J"],
    ) -> None:
        super().__init__(vectors, content_bias=content_bias, distance_bias=distance_bias)
        self.numbers = numbers

    def _by_key(
        self, by_distance: Float[Tensor, "B H Q L"], *, num_keys: int, keep_mask: KeepMask | None
    ) -> tuple[Float[Tensor, "B H Q J"], KeepMask]:
        del num_keys
        assert keep_mask is not None
        return by_distance.gather(-1, self.numbers.expand(-1, by_distance.shape[1], -1, -1)), keep_mask


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
        return DistanceFrame(self.vectors(sines), content_bias=self.content_bias, distance_bias=self.distance_bias)

    def vectors(self, sines: Float[Tensor, "J D"]) -> Float[Tensor, "H J E"]:
        """Return R for the distances J-1 .. 0, for each head."""
        vectors: Tensor = self.projection(sines)
        return vectors.unflatten(-1, self.content_bias.shape).transpose(0, 1)

    def cached_frame(
        self, vectors: Float[Tensor, "H L E"], *, numbers: Int64[Tensor, "B 1 Q J"]
    ) -> CachedDistanceFrame:
        """Return the layer's frame for cached keys; arguments as for `CachedDistanceFrame`."""
        return CachedDistanceFrame(
            vectors, content_bias=self.content_bias, distance_bias=self.distance_bias, numbers=numbers
        )


def descending_sinusoids(num_keys: int, *, width: int, like: Tensor) -> Float[Tensor, "J D"]:
    """Return the sinusoids of the distances J-1 .. 0, on the device and in the dtype of `like`."""
    distances = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoids(distances, width=width).to(like.dtype)
