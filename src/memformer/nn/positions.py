"""Token positions: rotary, and the simplified relative positions of the paper's first version.

A position scheme builds one frame per stack of layers. The frame applies positions to queries and keys (once, so that
keys can be cached with their positions) and computes attention. Positions are integers, and only differences between
query and key positions matter. The decoder counts its own tokens from 0 upwards and the encoder's from -1 downwards, so
that distances continue across the segment boundary.
"""

import math
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Positions = Int64[Tensor, " Q"] | Int64[Tensor, "B Q"]
# True where a query may attend to a key; or numbers that are added to the scores.
KeepMask = Bool[Tensor, "#B 1 #Q J"] | Float[Tensor, "#B 1 #Q J"]


# Largest number of keys for which bfloat16 attention on a CPU does not use the fused kernel. The kernel takes 1.2 to 6
# times as long there, forward and backward, most of all for short segments. Without it, all scores are held in memory.
_MAX_UNFUSED_KEYS = 1024


# Largest number of keys for which half-precision attention on CUDA uses the memory-efficient kernel. PyTorch would take
# cuDNN's, which is made for long sequences: at 28 and 64 keys it takes 1.4 times as long, forward and backward, on an
# H100; at 1,024 keys the efficient kernel takes 3.1 times as long as cuDNN's (benchmarks/gpu/attention.py).
_MAX_EFFICIENT_KEYS = 128

# Longest wavelength of the rotation divided by 2 pi, in tokens (arXiv 2104.09864).
_ROTARY_BASE = 10_000.0

_HALF = (torch.bfloat16, torch.float16)


class Frame:
    """Positions and attention of one stack of layers; this base class has no positions (used for memory slots).

    Attributes:
        is_same_for_keys: Whether queries and keys are changed alike.
    """

    is_same_for_keys = True

    def apply_to_queries(self, query: Tensor) -> Tensor:
        """Return the queries unchanged."""
        return query

    def apply_to_keys(self, key: Tensor) -> Tensor:
        """Return the keys unchanged."""
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
        """Return scaled dot-product attention."""
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= _MAX_UNFUSED_KEYS:
            scores = query / math.sqrt(query.shape[-1]) @ key.mT
            return _weights(scores, keep_mask=keep_mask, is_causal=is_causal, dropout=dropout) @ value
        if keep_mask is None and _suits_efficient_kernel(query, key, value):
            read: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, torch.is_grad_enabled(), dropout, is_causal
            )[0]
            return read
        return fused_attention(query, key, value, mask=keep_mask, is_causal=is_causal, dropout=dropout)


def fused_attention(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B H J E"],
    value: Float[Tensor, "B H J W"],
    *,
    mask: Tensor | None,
    is_causal: bool = False,
    dropout: float,
) -> Float[Tensor, "B H Q W"]:
    """Return PyTorch's scaled dot-product attention, in which dropout can be repeated.

    In half precision on CUDA, PyTorch's choice of a kernel depends on whether there is a mask and whether it needs a
    gradient, and each kernel drops other weights; replay needs the same ones with and without gradient. cuDNN's also
    rounds the probability to sixteenths (pytorch/pytorch#174245). So if weights are dropped there, only the
    memory-efficient kernel is left, and the plain one for widths that it does not support.
    """
    attend = partial(F.scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=is_causal)
    if dropout and query.device.type == "cuda" and query.dtype in _HALF:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return attend(dropout_p=dropout)
    return attend(dropout_p=dropout)


def mask_as_numbers(keep_mask: Bool[Tensor, "B 1 Q J"], *, like: Tensor) -> Float[Tensor, "B 1 Q J"]:
    """Return what attention makes of a mask in every layer: -inf where nothing is attended to, 0 elsewhere.

    Its rows begin at multiples of 16 elements, since attention on CUDA copies any other mask to such places.
    """
    numbers = torch.where(keep_mask, 0.0, float("-inf")).to(like.dtype)
    return F.pad(numbers, (0, -keep_mask.shape[-1] % 16))[..., : keep_mask.shape[-1]]


def _suits_efficient_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in _HALF
        and query.dtype == key.dtype == value.dtype
        and (query.dtype == torch.float16 or _has_bfloat16_kernel())
        and key.shape[-2] <= _MAX_EFFICIENT_KEYS
        and query.shape[-1] % 8 == 0 == value.shape[-1] % 8
    )


def _has_bfloat16_kernel() -> bool:
    """Return whether the GPU has this kernel in bfloat16, as all from Ampere on; PyTorch checks that only for its own.

    On others, attention in bfloat16 takes the plain kernel.
    """
    return torch.cuda.get_device_capability() >= (8, 0)


# As `torch.compiler.assume_constant_result` marks it, which would import the compiler here: that takes a second.
vars(_has_bfloat16_kernel)["_dynamo_marked_constant"] = True


def _weights(
    scores: Float[Tensor, "B H Q J"], *, keep_mask: KeepMask | None, is_causal: bool, dropout: float
) -> Float[Tensor, "B H Q J"]:
    """Return attention weights."""
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        keep_mask = causal[None, None] if keep_mask is None else keep_mask & causal
    if keep_mask is not None and keep_mask.is_floating_point():
        scores = scores + keep_mask
    elif keep_mask is not None:
        scores = scores.masked_fill(~keep_mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout)


class RotaryFrame(Frame):
    """Queries and keys rotated by their positions, with plain attention. Rotations are computed on first use."""

    def __init__(self, query_positions: Tensor, *, key_positions: Tensor, head_width: int) -> None:
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.head_width = head_width
        self.is_same_for_keys = key_positions is query_positions
        self._cached_rotations: dict[tuple[bool, torch.dtype], tuple[Tensor, Tensor]] = {}

    def prepare(self, x: Tensor) -> "RotaryFrame":
        """Compute the rotations for layers with this input; return the frame.

        So that layers compiled one by one all find the same frame.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        self._rotation(dtype, of_keys=False)
        self._rotation(dtype, of_keys=True)
        return self

    def with_keys(self, key_positions: Tensor) -> "RotaryFrame":
        """Return the frame for the same queries and other, already rotated keys: a query's rotation stays the same."""
        del key_positions
        return self

    def with_earlier_keys(self, key_positions: Tensor) -> "RotaryFrame":
        """Return the frame for the same queries, and other, already rotated keys before its own."""
        del key_positions
        return self

    def apply_to_queries(self, query: Tensor) -> Tensor:
        """Return the queries rotated by their positions."""
        return _rotate(query, rotation=self._rotation(query.dtype, of_keys=False))

    def apply_to_keys(self, key: Tensor) -> Tensor:
        """Return the keys rotated by their positions."""
        return _rotate(key, rotation=self._rotation(key.dtype, of_keys=True))

    def _rotation(self, dtype: torch.dtype, *, of_keys: bool) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines in one dtype, cached because every layer uses the same ones."""
        of_keys = of_keys and self.key_positions is not self.query_positions
        cached = self._cached_rotations.get((of_keys, dtype))
        if cached is None:
            positions = self.key_positions if of_keys else self.query_positions
            cos, sin = _compute_rotation(positions, head_width=self.head_width)
            cached = self._cached_rotations[of_keys, dtype] = cos.to(dtype), sin.to(dtype)
        return cached


def _compute_rotation(positions: Tensor, *, head_width: int) -> tuple[Tensor, Tensor]:
    half = head_width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = positions[..., None] * _ROTARY_BASE**-exponents
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    if positions.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, Q, D/H)
    return cos, sin


def _rotate(x: Tensor, *, rotation: tuple[Tensor, Tensor]) -> Tensor:
    # Pairs are (i, i + half), so halves are exchanged; the first half of the sines has a minus sign. On a CPU one roll
    # is faster than split and cat, on CUDA its kernel is slower.
    cos, sin = rotation
    if x.device.type == "cpu":
        exchanged = x.roll(x.shape[-1] // 2, dims=-1)
    else:
        first, second = x.split(x.shape[-1] // 2, dim=-1)
        exchanged = torch.cat([second, first], dim=-1)
    return torch.addcmul(x * cos, exchanged, sin)


class RotaryPositions(nn.Module):
    """Rotary position embedding (arXiv 2104.09864); the paper does not name its position scheme.

    Args:
        head_width: Width D/H of one head, even.
    """

    biased_projections = False

    def __init__(self, *, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(
        self, query_positions: Positions, *, key_positions: Tensor, new_key_positions: Tensor | None = None
    ) -> RotaryFrame:
        """Return the frame; `new_key_positions` are the positions of the new keys if the others are cached."""
        return RotaryFrame(
            query_positions,
            key_positions=key_positions if new_key_positions is None else new_key_positions,
            head_width=self.head_width,
        )


def sinusoids(distances: Int64[Tensor, " L"], *, width: int) -> Float[Tensor, "L width"]:
    """Return the sinusoidal vector of each distance (arXiv 1706.03762, section 3.5), in float64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=distances.device) / width
    angles = distances[:, None] * 10_000.0**-exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :width]


class RelativeFrame(Frame):
    """Attention with a vector R for each distance, added to keys and values."""

    def __init__(
        self, query_positions: Tensor, *, key_positions: Tensor, num_heads: int, head_width: int, longest: int
    ) -> None:
        self.query_positions = query_positions
        self.key_positions = key_positions
        self.num_heads = num_heads
        self.head_width = head_width
        self.longest = longest

    def with_keys(self, key_positions: Tensor) -> "RelativeFrame":
        """Return the frame for the same queries and other keys."""
        return RelativeFrame(
            self.query_positions,
            key_positions=key_positions,
            num_heads=self.num_heads,
            head_width=self.head_width,
            longest=self.longest,
        )

    def with_earlier_keys(self, key_positions: Tensor) -> "RelativeFrame":
        """Return the frame for the same queries, and other keys before its own."""
        rows = torch.broadcast_shapes(key_positions.shape[:-1], self.key_positions.shape[:-1])
        positions = [each.expand(*rows, -1) for each in (key_positions, self.key_positions)]
        return self.with_keys(torch.cat(positions, dim=-1))

    def prepare(self, x: Tensor) -> "RelativeFrame":
        """Return the frame, which has nothing to prepare."""
        del x
        return self

    @cached_property
    def _distances(self) -> tuple[Tensor, Tensor]:
        """Vectors (H, L, D/H) of the L distances that occur, and the vector index of each query-key pair."""
        distances = self.query_positions[..., :, None] - self.key_positions[..., None, :]  # (Q, J) or (B, Q, J)
        if distances.device.type == "cpu":
            nearest, farthest = int(distances.min()), int(distances.max())
        else:  # limits that need no waiting for the device
            num_queries, num_keys = distances.shape[-2:]
            nearest, farthest = -num_keys, max(num_queries, self.longest) + num_keys + 1
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

    Queries, keys and values have biases. v1 counts 1.05 M parameters per layer at width 512, which are exactly the four
    projections and their biases. So R has no parameters here: it is the sinusoid of the distance.

    Args:
        num_heads: Number of heads H.
        head_width: Width D/H of one head.
        longest: Largest position of a query, if there are fewer queries than that: the length of a segment.
    """

    biased_projections = True

    def __init__(self, *, num_heads: int, head_width: int, longest: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = head_width
        self.longest = longest

    def forward(
        self, query_positions: Positions, *, key_positions: Tensor, new_key_positions: Tensor | None = None
    ) -> RelativeFrame:
        """Return the frame; keys are stored without positions, so `new_key_positions` is not used."""
        del new_key_positions
        return RelativeFrame(
            query_positions,
            key_positions=key_positions,
            num_heads=self.num_heads,
            head_width=self.head_width,
            longest=self.longest,
        )


PositionSchemes = RotaryPositions | RelativePositions
