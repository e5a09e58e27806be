"""Multi-head attention between tokens; positions are passed in as a frame."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.nn.linear import Linear, part_of_output
from memformer.nn.positions import Frame

HeadTokens = Float[Tensor, "B H J E"]


@dataclass
class AttentionRecord:
    """Attention weights of one timestep, filled when it is passed to `encode` of a model with slots.

    In a `RecurrentMemoryTransformer` the slots are the memory tokens. Its tokens and slots also attend to others of
    their kind, so rows sum to less than 1; `writer` is the mean over layers, and a slot's weight for itself is that of
    its write token for its read token and for itself.

    Attributes:
        reader: (B, H, S, K) for each encoder layer: each token's weight for each slot. Rows sum to 1.
        writer: (B, H, K, 1 + S): each slot's weight for itself (first column) and for each token. Rows sum to 1.
        taken: (B, K, W): what each slot took from the tokens: their values times the weights, heads side by side. Only
            of models with a memory writer.
        left: (B, K): share of each written slot that forgetting leaves; see `MemoryNormalization.share_left`. None if
            the model does not forget by a vector.
    """

    reader: list[Tensor] = field(default_factory=list)
    writer: Tensor | None = None
    taken: Tensor | None = None
    left: Tensor | None = None

    def clear(self) -> None:
        """Forget the weights of an earlier timestep."""
        self.reader, self.writer, self.taken, self.left = [], None, None, None


def split_heads(x: Float[Tensor, "B J D"], num_heads: int) -> HeadTokens:
    """Return x split into heads, (B, H, J, D/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: HeadTokens) -> Float[Tensor, "B J D"]:
    """Return the heads concatenated, (B, J, D)."""
    return x.transpose(1, 2).flatten(-2)


def keep_mask_of(padding_mask: Bool[Tensor, "B J"] | None) -> Bool[Tensor, "B 1 1 J"] | None:
    """Return a mask that is True at the keys that may be attended to.

    In a row that is all padding, all keys may be attended to. The output of such a row is never used, but it must be
    finite, because its zero gradient times infinity would be NaN.
    """
    if padding_mask is None:
        return None
    keep = ~padding_mask | padding_mask.all(dim=-1, keepdim=True)
    return keep[:, None, None, :]


def join_keys_values(
    earlier: tuple[Float[Tensor, "B H P E"], Float[Tensor, "B H P E"]], own: tuple[HeadTokens, HeadTokens]
) -> tuple[Float[Tensor, "B H P+J E"], Float[Tensor, "B H P+J E"]]:
    """Return the keys and values of earlier tokens and, behind them, of others, in the dtype of the latter."""
    keys, values = (torch.cat([first.to(then.dtype), then], dim=2) for first, then in zip(earlier, own, strict=True))
    return keys, values


class KeyValueCache:
    """Keys (with positions applied) and values of decoded tokens, at most `length` per row.

    One extra position is allocated: the padding of a chunk with unequal rows is written there.
    """

    def __init__(self, *, batch_size: int, num_heads: int, length: int, head_width: int, like: Tensor) -> None:
        shape = (batch_size, num_heads, length + 1, head_width)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these; in place if their number does not change, for CUDA graphs."""
        keys, values = self.keys[rows], self.values[rows]
        if keys.shape == self.keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values

    @property
    def num_bytes(self) -> int:
        """Number of allocated bytes, filled or not."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class CacheWindow:
    """Cache positions that the tokens of one decoding step are written to, and those that they attend to.

    Args:
        keys: Cached keys of one layer, (B, H, L, E).
        values: Cached values of the layer.
        rows: Numbers of the rows, (B, 1).
        positions: Cache positions of the new tokens, (B, Q).
        num_keys: Number of leading cache positions that are attended to.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor
    num_keys: int

    def write(self, key: HeadTokens, value: HeadTokens) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens; return those of the first `num_keys` positions."""
        keys, values = self.keys, self.values
        # By index and not by scatter_, after which compiled code of torch 2.13 reads the values from before.
        keys[self.rows, :, self.positions] = key.transpose(1, 2).to(keys.dtype)
        values[self.rows, :, self.positions] = value.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self.num_keys], values[:, :, : self.num_keys]


def _weights_of(
    frame: Frame, query: Float[Tensor, "B H Q E"], key: HeadTokens, *, keep_mask: Tensor | None, is_causal: bool
) -> Float[Tensor, "B H Q J"]:
    """Return the attention weights, detached; not for relative positions, which are a part of the values too."""
    # Attention over unit vectors returns the weights, so no second implementation has to be kept in sync.
    units = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device).expand(*key.shape[:-1], -1)
    return frame.attend(query, key, units, keep_mask=keep_mask, is_causal=is_causal, dropout=0.0).detach()


class SelfAttention(nn.Module):
    """Attention of tokens to tokens of their own segment and, if given, to tokens before it.

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
        earlier: tuple[HeadTokens, HeadTokens] | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return the attention output of each token; with a cache, tokens decoded earlier are attended to as well.

        `past` are tokens before the segment that are only attended to, and `earlier` are the keys, with positions
        applied, and the values of such tokens; they come first. The weights (B, H, Q, J) are appended to `record`, if
        given.
        """
        projected = self.query_key_value(x)
        if cache is not None and frame.is_same_for_keys:
            # Queries and keys together, because a step of one token waits for launches; whole segments are slower so.
            query_key, value = split_heads(projected, 3 * self.num_heads).tensor_split([2 * self.num_heads], dim=1)
            query, key = frame.apply_to_queries(query_key).chunk(2, dim=1)
        else:
            query, key, value = (split_heads(part, self.num_heads) for part in projected.chunk(3, dim=-1))
            if past is not None:
                past_key, past_value = self._project_past(past)
                key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
            query, key = frame.apply_to_queries(query), frame.apply_to_keys(key)
        if cache is not None:
            key, value = cache.write(key, value)
        if earlier is not None:
            key, value = join_keys_values(earlier, (key, value))
        dropout = self.dropout if self.training else 0.0
        if record is not None:
            record.append(_weights_of(frame, query, key, keep_mask=keep_mask, is_causal=is_causal))
        read = frame.attend(query, key, value, keep_mask=keep_mask, is_causal=is_causal, dropout=dropout)
        return self.output(merge_heads(read))

    def project(self, past: Float[Tensor, "B P D"], *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the keys, with positions applied, and the values of tokens before the segment, as `earlier`."""
        key, value = self._project_past(past)
        return frame.apply_to_keys(key), value

    def _project_past(self, past: Float[Tensor, "B P D"]) -> tuple[HeadTokens, HeadTokens]:
        """Return keys and values of past tokens."""
        width = past.shape[-1]
        key, value = part_of_output(self.query_key_value, past, slice(width, None)).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)


class CrossAttention(nn.Module):
    """Attention of tokens (queries) to another sequence (keys and values).

    Args:
        width: Model width D.
        num_heads: Number of heads H, a divisor of `width`.
        dropout: Probability of dropping an attention weight in training.
        bias: Whether the projections of queries, keys and values have biases.
        source_width: Width of the other sequence. None: `width`.
    """

    def __init__(
        self, width: int, *, num_heads: int, dropout: float, bias: bool, source_width: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(width, width, bias=bias)
        self.key_value = Linear(width if source_width is None else source_width, 2 * width, bias=bias)
        self.output = Linear(width, width, bias=bias)

    def project(self, source: Float[Tensor, "B J W"], *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the keys, with positions applied, and the values of `source`, so that they can be reused."""
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(source).chunk(2, dim=-1))
        return frame.apply_to_keys(key), value

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
        """Return the attention output of each token; append the weights (B, H, Q, J) to `record`, if given."""
        query = frame.apply_to_queries(split_heads(self.query(x), self.num_heads))
        dropout = self.dropout if self.training else 0.0
        if record is not None:
            record.append(_weights_of(frame, query, key, keep_mask=keep_mask, is_causal=False))
        read = frame.attend(query, key, value, keep_mask=keep_mask, is_causal=False, dropout=dropout)
        return self.output(merge_heads(read))
