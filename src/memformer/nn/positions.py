"""Where tokens stand: rotary positions, and the simplified relative positions of the paper's first version.

A position scheme builds one frame per stack of layers. The frame places queries and keys (once, so that placed
keys can be cached) and attends. Positions are integers; only differences between query and key positions matter, so
the decoder counts its own tokens from 0 and the encoder's backwards from -1: distance continues across the boundary.
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

Positions = Int64[Tensor, " Q"] | Int64[Tensor, "B Q"]
KeepMask = Bool[Tensor, "#B 1 #Q J"]


# Keys up to which attention is spelled out on a CPU in bfloat16: the fused kernel takes 1.2 to 6 times as long there,
# forward and backward, most of all for short segments; holding the scores is its price.
_LONGEST_SPELLED_OUT = 1024


class Frame:
    """How one stack of layers places its queries and keys, and attends; this one has no positions, as memory slots."""

    def place_queries(self, query: Tensor) -> Tensor:
        """Return the queries as they are."""
        return query

    def place_keys(self, key: Tensor) -> Tensor:
        """Return the keys as they are."""
        return key

    def attend(
        self,
        query: Float[Tensor, "B H Q E"],
        key: Float[Tensor, "B H J E"],
        value: Float[Tensor, "B H J W"],
        *,
        keep_mask: KeepMask | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H Q W"]:
        """Return scaled dot-product attention; `keep_mask` is True where a query may look."""
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= _LONGEST_SPELLED_OUT:
            scores = query / math.sqrt(query.shape[-1]) @ key.mT
            return _weights(scores, keep_mask=keep_mask, is_causal=is_causal, dropout=dropout) @ value
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=keep_mask, is_causal=is_causal, dropout_p=dropout
        )


def _weights(
    scores: Float[Tensor, "B H Q J"], *, keep_mask: KeepMask | None, is_causal: bool, dropout: float
) -> Float[Tensor, "B H Q J"]:
    """Return attention weights."""
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        keep_mask = causal[None, None] if keep_mask is None else keep_mask & causal
    if keep_mask is not None:
        scores = scores.masked_fill(~keep_mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout)


class RotaryFrame(Frame):
    """Queries and keys turned by their positions; attention itself is plain. Turns are made when first needed."""

    def __init__(self, query_positions: Tensor, *, key_positions: Tensor, head_width: int, base: float) -> None:
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.head_width = head_width
        self.base = base
        self._known_turns: dict[tuple[bool, torch.dtype], tuple[Tensor, Tensor]] = {}

    def towards(self, key_positions: Tensor) -> "RotaryFrame":
        """Return the frame of the same queries and other keys, placed already: a query is turned alike for all."""
        del key_positions
        return self

    def place_queries(self, query: Tensor) -> Tensor:
        """Return the queries turned by their positions."""
        return _rotate(query, turns=self._turns(query.dtype, of_keys=False))

    def place_keys(self, key: Tensor) -> Tensor:
        """Return the keys turned by their positions."""
        return _rotate(key, turns=self._turns(key.dtype, of_keys=True))

    def _turns(self, dtype: torch.dtype, *, of_keys: bool) -> tuple[Tensor, Tensor]:
        """Return the turns in one dtype: every layer asks for the same ones."""
        of_keys = of_keys and self.key_positions is not self.query_positions
        known = self._known_turns.get((of_keys, dtype))
        if known is None:
            positions = self.key_positions if of_keys else self.query_positions
            cos, sin = _turns(positions, head_width=self.head_width, base=self.base)
            known = self._known_turns[of_keys, dtype] = cos.to(dtype), sin.to(dtype)
        return known


def _turns(positions: Tensor, *, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    half = head_width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = positions[..., None] * base**-exponents
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    if positions.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, Q, D/H)
    return cos, sin


def _rotate(x: Tensor, *, turns: tuple[Tensor, Tensor]) -> Tensor:
    # Pairs are (i, i + half); the sine carries the minus sign of its first half, so one roll replaces split and cat.
    cos, sin = turns
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class RotaryPositions(nn.Module):
    """Rotary position embedding (arXiv 2104.09864); the paper names no scheme.

    Args:
        head_width: Width D/H of one head, even.
        base: Longest wavelength over 2 pi, in tokens.
    """

    biased_projections = False

    def __init__(self, *, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.head_width = head_width
        self.base = base

    def forward(
        self, query_positions: Positions, *, key_positions: Tensor, new_key_positions: Tensor | None = None
    ) -> RotaryFrame:
        """Return the frame; `new_key_positions` are those of the keys still to place, where others are cached."""
        return RotaryFrame(
            query_positions,
            key_positions=key_positions if new_key_positions is None else new_key_positions,
            head_width=self.head_width,
            base=self.base,
        )


def sinusoids(distances: Int64[Tensor, " L"], *, width: int) -> Float[Tensor, "L width"]:
    """Return a vector of sines and cosines for each distance (arXiv 1706.03762, section 3.5), in float64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=distances.device) / width
    angles = distances[:, None] * 10_000.0**-exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :width]


class RelativeFrame(Frame):
    """Attention with a vector R for each distance, in the scores and in what is read."""

    def __init__(self, query_positions: Tensor, *, key_positions: Tensor, num_heads: int, head_width: int) -> None:
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.num_heads = num_heads
        self.head_width = head_width

    def towards(self, key_positions: Tensor) -> "RelativeFrame":
        """Return the frame of the same queries and other keys."""
        return RelativeFrame(
            self.query_positions, key_positions=key_positions, num_heads=self.num_heads, head_width=self.head_width
        )

    @cached_property
    def _distances(self) -> tuple[Tensor, Tensor]:
        """Vectors (H, L, D/H) of the L distances that occur, and which of them a query and a key have."""
        distances = self.query_positions[..., :, None] - self.key_positions[..., None, :]  # (Q, J) or (B, Q, J)
        nearest, farthest = int(distances.min()), int(distances.max())
        span = torch.arange(nearest, farthest + 1, device=distances.device)
        vectors = sinusoids(span, width=self.num_heads * self.head_width)  # (L, D)
        index = (distances - nearest).unsqueeze(-3)
        vectors = vectors.unflatten(-1, (self.num_heads, self.head_width)).movedim(1, 0)
        return vectors, index[None] if index.ndim == 3 else index

    def attend(
        self,
        query: Float[Tensor, "B H Q E"],
        key: Float[Tensor, "B H J E"],
        value: Float[Tensor, "B H J W"],
        *,
        keep_mask: KeepMask | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H Q E"]:
        """Return softmax(Q (K + R)^T / sqrt(D/H)) (V + R)."""
        vectors, index = self._distances
        vectors = vectors.to(query.dtype)
        scores = query @ key.mT  # (B, H, Q, J)
        index = index.expand_as(scores)
        scores = (scores + (query @ vectors.mT).gather(-1, index)) / math.sqrt(query.shape[-1])
        weights = _weights(scores, keep_mask=keep_mask, is_causal=is_causal, dropout=dropout)
        by_distance = weights.new_zeros(*weights.shape[:-1], vectors.shape[-2]).scatter_add(-1, index, weights)
        return weights @ value + by_distance @ vectors


class RelativePositions(nn.Module):
    """Simplified relative positions (arXiv 2010.06891v1): A_ij = Q_i.(K_j + R_{i-j}), H_i = sum_j A_ij (V_j + R_{i-j}).

    Queries, keys and values have biases. v1 counts 1.05 M parameters a layer at width 512, which is the four
    projections and their biases alone; so R has none of its own here: it is the sinusoid of the distance.

    Args:
        num_heads: Number of heads H.
        head_width: Width D/H of one head.
    """

    biased_projections = True

    def __init__(self, *, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = head_width

    def forward(
        self, query_positions: Positions, *, key_positions: Tensor, new_key_positions: Tensor | None = None
    ) -> RelativeFrame:
        """Return the frame; keys carry no position of their own, so `new_key_positions` is not needed."""
        del new_key_positions
        return RelativeFrame(
            query_positions, key_positions=key_positions, num_heads=self.num_heads, head_width=self.head_width
        )


PositionSchemes = RotaryPositions | RelativePositions
