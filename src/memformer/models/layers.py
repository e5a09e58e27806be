"""Pre-LayerNorm encoder and decoder layers with residual connections (arXiv 2010.06891v2, Figure 1)."""

from jaxtyping import Float
from torch import Tensor, nn

from memformer.models.baseline_configs import DecoderConfig
from memformer.models.config import MemformerConfig, MemoryEncoderConfig
from memformer.nn.attention import AttentionRecord, CacheWindow, CrossAttention, HeadTokens, SelfAttention
from memformer.nn.linear import Linear
from memformer.nn.memory import MemoryReader
from memformer.nn.positions import Frame
from memformer.shapes import Hidden, Memory, SlotBias


class FeedForward(nn.Module):
    """Two linear layers with a GELU in between.

    Args:
        width: Model width D.
        d_ff: Hidden width F.
    """

    def __init__(self, width: int, *, d_ff: int) -> None:
        super().__init__()
        self.expand = Linear(width, d_ff)
        self.activation = nn.GELU()
        self.output = Linear(d_ff, width)

    def forward(self, x: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q D"]:
        """Return the output of each token."""
        return self.output(self.activation(self.expand(x)))


class EncoderLayer(nn.Module):
    """Layer of self-attention, memory reader and feed-forward.

    Args:
        config: The model's config; with `num_slots` 0 there is no memory reader.
        bias: Whether the projections of self-attention have biases.
    """

    def __init__(self, config: MemoryEncoderConfig, *, bias: bool) -> None:
        super().__init__()
        width, heads, dropout = config.d_model, config.num_heads, config.attention_dropout_probability
        reads_memory = config.num_slots > 0
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads=heads, dropout=dropout, bias=bias)
        self.memory_reader_norm = nn.LayerNorm(width) if reads_memory else None
        self.memory_reader = (
            MemoryReader(width, slot_width=config.memory_width, num_heads=heads, dropout=dropout)
            if reads_memory
            else None
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, d_ff=config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "L S D"],
        *,
        slots: Memory | None,
        slot_bias: SlotBias | None = None,
        frame: Frame,
        keep_mask: Tensor | None,
        record: AttentionRecord | None = None,
    ) -> Float[Tensor, "L S D"]:
        """Return the segments after one layer; tokens attend to each other in both directions and to the slots."""
        x = x + self.dropout(self.self_attention(self.self_attention_norm(x), frame=frame, keep_mask=keep_mask))
        if self.memory_reader is not None and self.memory_reader_norm is not None:
            x = x + self.dropout(
                self.memory_reader(self.memory_reader_norm(x), slots=slots, slot_bias=slot_bias, record=record)
            )
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(nn.Module):
    """Layer of causal self-attention that also attends to the previous segment, and feed-forward.

    With `decoder_attention: separate`, the paper's design, self-attention attends to the segment alone, and
    cross-attention to the previous segment follows.

    Args:
        config: The model's config.
        bias: Whether the projections of self- and cross-attention have biases.
    """

    def __init__(self, config: MemformerConfig, *, bias: bool) -> None:
        super().__init__()
        width, heads, dropout = config.d_model, config.num_heads, config.attention_dropout_probability
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads=heads, dropout=dropout, bias=bias)
        is_joint = config.decoder_attention == "joint"
        self.cross_attention_norm = None if is_joint else nn.LayerNorm(width)
        self.cross_attention = None if is_joint else CrossAttention(width, num_heads=heads, dropout=dropout, bias=bias)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, d_ff=config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def precompute_past(self, hidden: Hidden, *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the keys and values of the previous segment."""
        return (self.self_attention if self.cross_attention is None else self.cross_attention).project(
            hidden, frame=frame
        )

    def project(self, x: Float[Tensor, "B Q D"], *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the keys and values of tokens that the layer reads by itself."""
        return self.self_attention.project(self.self_attention_norm(x), frame=frame)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        past: tuple[HeadTokens, HeadTokens],
        past_frame: Frame,
        past_keep_mask: Tensor | None,
        frame: Frame,
        keep_mask: Tensor | None = None,
        cache: CacheWindow | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the features of the targets after one layer; `past` are keys and values of the previous segment.

        If attention is joint, `frame` and `keep_mask` are those of the keys of the past and then of the targets.
        """
        is_joint = self.cross_attention is None
        x = x + self.dropout(
            self.self_attention(
                self.self_attention_norm(x),
                frame=frame,
                keep_mask=keep_mask,
                is_causal=cache is None and not is_joint,
                cache=cache,
                earlier=past if is_joint else None,
            )
        )
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            key, value = past
            x = x + self.dropout(
                self.cross_attention(
                    self.cross_attention_norm(x), key=key, value=value, frame=past_frame, keep_mask=past_keep_mask
                )
            )
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class CausalLayer(nn.Module):
    """Layer of self-attention and feed-forward, for single-stack models that predict the next token.

    Args:
        config: The model's config.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, heads, dropout = config.d_model, config.num_heads, config.attention_dropout_probability
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads=heads, dropout=dropout, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, d_ff=config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        frame: Frame,
        keep_mask: Tensor | None,
        past: Float[Tensor, "B P D"] | None = None,
        cache: CacheWindow | None = None,
        record: list[Tensor] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return the tokens after one layer.

        Args:
            x: The layer's input for each token.
            frame: Positions of the tokens and the past.
            keep_mask: True where a token may attend, past first. None: everywhere that the frame allows.
            past: The layer's input for earlier tokens.
            cache: Keys and values of earlier tokens, instead of `past`; those of the tokens are added.
            record: The attention weights (B, H, Q, J) are appended to it, if given.
        """
        if past is not None:
            past = self.self_attention_norm(past)
        read = self.self_attention(
            self.self_attention_norm(x), frame=frame, keep_mask=keep_mask, past=past, cache=cache, record=record
        )
        x = x + self.dropout(read)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def project(self, past: Float[Tensor, "B P D"], *, frame: Frame) -> tuple[HeadTokens, HeadTokens]:
        """Return the keys and values of earlier tokens, from the layer's input for them."""
        return self.self_attention.project(self.self_attention_norm(past), frame=frame)
