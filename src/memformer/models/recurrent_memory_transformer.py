"""The Recurrent Memory Transformer (arXiv 2207.06881)."""

from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memformer.models.baseline_configs import RecurrentMemoryTransformerConfig
from memformer.models.layers import CausalLayer
from memformer.models.next_token import NextTokenModel, SegmentState, TokenCounts, place_behind_padding
from memformer.nn.attention import AttentionRecord, CacheWindow
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.linear import recompute_weights
from memformer.nn.positions import RotaryPositions
from memformer.shapes import Hidden, Memory, Segment, SegmentPadding


class RecurrentMemoryTransformer(NextTokenModel):
    """Causal stack that reads its memory as M tokens before the segment and writes it as M tokens after the segment.

    The input of the stack is [M read tokens, segment, M write tokens], where both read and write tokens are the current
    memory. The output at the write tokens, after the last LayerNorm, is the next memory. Gradients flow through it.

    - A read token attends to all read tokens, and to nothing else.
    - A token of the segment attends to all read tokens, to the tokens before it and to itself.
    - A write token attends to everything: all read tokens, all tokens of the segment (not padding), all write tokens.

    A document starts from learned memory tokens. Positions are rotary and are counted from the first read token; in a
    padded segment the write tokens directly follow the last token.

    Departures from arXiv 2207.06881: its stack is a Transformer-XL with that model's positions (and, in some of its
    experiments, its cache); here positions are rotary, as in the Memformer, and there is no cache. LayerNorm comes
    before each sub-layer and the activation is GELU, as in the Memformer.

    Args:
        config: The model's config.
    """

    config: RecurrentMemoryTransformerConfig
    config_class: ClassVar[type[RecurrentMemoryTransformerConfig]] = RecurrentMemoryTransformerConfig

    def __init__(self, config: RecurrentMemoryTransformerConfig) -> None:
        super().__init__(config)
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.d_model))
        self.positions = RotaryPositions(head_width=config.head_width)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self._initialise()

    def _initialise(self) -> None:
        super()._initialise()
        nn.init.normal_(self.memory_tokens)  # the scale of embedded tokens and of the last LayerNorm's output

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of memory tokens M and their width D."""
        return self.config.num_memory_tokens, self.config.d_model

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the learned memory tokens for each row, in float32 (float64 if the model is float64)."""
        recompute_weights(self)
        return self.memory_tokens.to(self.memory_dtype).expand(batch_size, -1, -1)

    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        attention: AttentionRecord | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return the hidden state of each token and the next memory.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding. None: no padding.
            attention: Receives the attention weights of tokens and memory tokens, if given; in each row, padding
                follows the tokens.
            auxiliary: Must be None: this model has no auxiliary loss.

        Raises:
            InputError: As for all next-token models.
            InputTypeError: A dtype is wrong.
        """
        if auxiliary is not None:
            self.check_auxiliary_loss()
        if attention is not None:
            attention.clear()
        read = self._read if attention is None else partial(self._read, attention=attention)
        return self._encode(segment, memory, padding_mask, read)

    def _read(
        self,
        x: Hidden,
        *,
        memory: Memory,
        num_tokens: TokenCounts | None,
        attention: AttentionRecord | None = None,
    ) -> tuple[Hidden, Memory]:
        num_memory, length = memory.shape[1], x.shape[1]
        memory_tokens = memory.to(x.dtype)
        positions, keep_mask = self._make_positions_and_mask(length, num_tokens)
        frame = self.positions(positions, key_positions=positions)
        x = torch.cat([memory_tokens, x, memory_tokens], dim=1)
        weights: list[Tensor] | None = None if attention is None else []
        for layer in self.layers:
            x = layer(x, frame=frame, keep_mask=keep_mask, record=weights)
        if attention is not None and weights is not None:
            end = num_memory + length
            attention.reader += [each[:, :, num_memory:end, :num_memory] for each in weights]
            written = torch.stack(weights).mean(dim=0)[:, :, end:]  # (B, H, M, 2M + S)
            from_read, from_written = written[..., :num_memory], written[..., end:]
            own = from_read.diagonal(dim1=-2, dim2=-1) + from_written.diagonal(dim1=-2, dim2=-1)
            attention.writer = torch.cat([own[..., None], written[..., num_memory:end]], dim=-1)
        _, hidden, written = self.norm(x).split([num_memory, length, num_memory], dim=1)
        return hidden, written.to(memory.dtype)

    def begin_segment(self, memory: Memory) -> SegmentState:
        """Return the keys and values of the read tokens for each layer."""
        if type(self) is not RecurrentMemoryTransformer:  # a subclass may read otherwise
            return super().begin_segment(memory)
        batch_size, num_memory = memory.shape[:2]
        state = SegmentState(self._new_caches(batch_size))
        places = torch.arange(num_memory, device=self.device).expand(batch_size, -1)
        self._run_cached(memory.to(state.rows[0].dtype), state, places=places, num_keys=num_memory)
        return state

    @property
    def _places_before_segment(self) -> int:
        return self.config.num_memory_tokens

    def read_tokens(
        self, tokens: Segment, state: SegmentState, *, positions: Segment, num_tokens: int
    ) -> tuple[Hidden, SegmentState]:
        """Read the next tokens of a segment; arguments and result as in `NextTokenModel`."""
        if state.reads_again:
            return super().read_tokens(tokens, state, positions=positions, num_tokens=num_tokens)
        state = SegmentState(self._with_places(state.rows, num_tokens=num_tokens))
        num_memory = self.config.num_memory_tokens
        num_keys, last = num_memory + num_tokens, state.rows[0].shape[2] - 1
        places = (num_memory + positions).clamp(max=last)  # padding is written to the last place
        keep_mask = (torch.arange(num_keys, device=places.device) <= places[..., None])[:, None]
        x = self._run_cached(self._embed(tokens), state, places=places, num_keys=num_keys, keep_mask=keep_mask)
        return self.norm(x), state

    def _run_cached(
        self, x: Hidden, state: SegmentState, *, places: Segment, num_keys: int, keep_mask: Tensor | None = None
    ) -> Hidden:
        """Return the output of the layers for tokens at these places, the first read token being at 0."""
        frame = self.positions(places, key_positions=places)
        rows = torch.arange(len(x), device=x.device)[:, None]
        for layer, keys, values in zip(self.layers, state.rows[::2], state.rows[1::2], strict=True):
            window = CacheWindow(keys, values, rows, places, num_keys=num_keys)
            x = layer(x, frame=frame, keep_mask=keep_mask, cache=window)
        return x

    def _make_positions_and_mask(
        self, length: int, num_tokens: TokenCounts | None
    ) -> tuple[Int64[Tensor, "*B Q"], Bool[Tensor, "#B 1 Q Q"]]:
        """Return the positions of read tokens, segment and write tokens, and a mask, True where they may attend."""
        num_memory = self.config.num_memory_tokens
        end = num_memory + length
        index = torch.arange(end + num_memory, device=self.device)
        query, key = index[:, None], index
        keep_mask = (key < num_memory) | (key <= query) | (query >= end)
        if num_tokens is None:
            return index, keep_mask[None, None]
        return place_behind_padding(keep_mask, end=end, num_padding=length - num_tokens)
