"""Multi-head attention of tokens to tokens, with positions passed in as a frame."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.nn.linear import Linear, linear
from memformer.nn.positions import Frame

HeadTokens = Float[Tensor, "B H J E"]


@dataclass
class AttentionRecord:
    """Attention weights of one timestep, filled by `Memformer.encode` when it is passed in.

    Attributes:
        reader: For each encoder layer, (B, H, S, K): how much each token reads of each slot. Rows sum to 1.
        writer: (B, H, K, 1 + S): how much each slot keeps of itself (first column) and takes of each token.
    """

    reader: list[Tensor] = field(default_factory=list)
    writer: Tensor | None = None


def split_heads(x: Float[Tensor, "B J D"], num_heads: int) -> HeadTokens:
    """Return x as heads, (B, H, J, D/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: HeadTokens) -> Float[Tensor, "B J D"]:
    """Return heads side by side again, (B, J, D)."""
    return x.transpose(1, 2).flatten(-2)


def keep_mask_of(padding_mask: Bool[Tensor, "B J"] | None) -> Bool[Tensor, "B 1 1 J"] | None:
    """Return True at the keys that may be looked at.

    In a row that is all padding everything may be looked at: what such a row computes is never used, but it must stay
    finite, or its zero gradient times infinity would be NaN.
    """
    if padding_mask is None:
        return None
    keep = ~padding_mask | padding_mask.all(dim=-1, keepdim=True)
    return keep[:, None, None, :]


class KeyValueCache:
    """Placed keys and values of tokens already decoded, at most `length` of them for each row.

    One position more than `length` is held: tokens that are padding in a chunk of unequal rows are written there.
    """

    def __init__(self, *, batch_size: int, num_heads: int, length: int, head_width: int, like: Tensor) -> None:
        shape = (batch_size, num_heads, length + 1, head_width)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)

    @property
    def num_bytes(self) -> int:
        """Bytes held, whatever is filled."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class CacheWindow:
    """Where the tokens of one step stand in a cache, and how much of it they look at.

    Args:
        cache: The cache of one layer.
        positions: Places of the new tokens, (B, Q).
        num_keys: Positions from the first on that hold all that is looked at.
    """

    cache: KeyValueCache
    positions: Tensor
    num_keys: int

    def write(self, key: HeadTokens, value: HeadTokens) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens; return those of the first positions."""
        keys, values = self.cache.keys, self.cache.values
        index = self.positions[:, None, :, None].expand_as(key)
        keys.scatter_(2, index, key.to(keys.dtype))
        values.scatter_(2, index, value.to(values.dtype))
        return keys[:, :, : self.num_keys], values[:, :, : self.num_keys]


class SelfAttention(nn.Module):
    """Tokens attend to tokens of their own segment, and to those before it that are given.

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        dropout: Probability of dropping an attention weight in training.
        bias: Whether the projections of queries, keys and values have biases.
    """

    def __init__(self, width: int, *, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = Linear(width, 3 * width, bias=bias)
        self.output = Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        frame: Frame,
        keep_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: CacheWindow | None = None,
        past: Float[Tensor, "B P D"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return what each token reads from the others; with a cache, from those decoded before it too.

        `past` are tokens that are looked at and do not look: their keys stand before the others'.
        """
        query, key, value = (split_heads(part, self.num_heads) for part in self.query_key_value(x).chunk(3, dim=-1))
        if past is not None:
            past_key, past_value = self._look_back(past)
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        query, key = frame.place_queries(query), frame.place_keys(key)
        if cache is not None:
            key, value = cache.write(key, value)
        dropout = self.dropout if self.training else 0.0
        read = frame.attend(query, key, value, keep_mask=keep_mask, is_causal=is_causal, dropout=dropout)
        return self.output(merge_heads(read))

    def _look_back(self, past: Float[Tensor, "B P D"]) -> tuple[HeadTokens, HeadTokens]:
        """Return keys and values."""
        width, projection = past.shape[-1], self.query_key_value
        bias = None if projection.bias is None else projection.bias[width:]
        key, value = linear(past, projection.weight[width:], bias).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)


class CrossAttention(nn.Module):
    """Tokens (queries) attend to something else (keys and values).

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        dropout: Probability of dropping an attention weight in training.
        bias: Whether the projections of queries, keys and values have biases.
    """

    def __init__(self, width: int, *, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(width, width, bias=bias)
        self.key_value = Linear(width, 2 * width, bias=bias)
        self.output = Linear(width, width, bias=bias)

    def project(self, source: Float[Tensor, "B J D"], *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the placed keys and the values of what is attended to, so that they can be used again."""
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(source).chunk(2, dim=-1))
        return frame.place_keys(key), value

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        key: HeadTokens,
        value: HeadTokens,
        frame: Frame,
        keep_mask: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return what each token reads; append the attention weights (B, H, Q, J) to `record` if one is given."""
        query = frame.place_queries(split_heads(self.query(x), self.num_heads))
        dropout = self.dropout if self.training else 0.0
        if record is not None:
            # The weights are what the same attention reads from unit vectors: no second implementation to drift.
            units = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*key.shape[:-1], -1)
            record.append(frame.attend(query, key, units, keep_mask=keep_mask, is_causal=False, dropout=0.0).detach())
        read = frame.attend(query, key, value, keep_mask=keep_mask, is_causal=False, dropout=dropout)
        return self.output(merge_heads(read))
