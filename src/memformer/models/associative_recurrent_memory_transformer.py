"""The Associative Recurrent Memory Transformer (arXiv 2407.04841)."""

from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memformer.models.baseline_configs import AssociativeRecurrentMemoryTransformerConfig
from memformer.models.layers import CausalLayer
from memformer.models.next_token import NextTokenModel, SegmentState, TokenCounts, place_behind_padding
from memformer.nn.associative import FEATURES_PER_COMPONENT, AssociativeMemory
from memformer.nn.attention import CacheWindow
from memformer.nn.linear import recompute_weights
from memformer.nn.positions import RotaryPositions
from memformer.shapes import Hidden, Memory, Segment


class AssociativeRecurrentMemoryTransformer(NextTokenModel):
    """Causal stack in which every layer has an associative memory: a table that all tokens read before the layer.

    The input of the stack is [segment, M memory tokens]. The memory tokens are learned and the same for all segments;
    they attend to the segment and to those before them. What they are after a layer is written to its table: the value
    of a key that is there already is replaced (a delta rule). Gradients flow through the tables.

    The memory holds the tables of all layers side by side, with one slot for each feature of a key. It starts at zero.

    Departures from arXiv 2407.04841: its stack is a GPT-2, with absolute positions, biases and fixed places for the
    memory tokens. Here positions are rotary, the projections of attention have no biases, and the memory tokens
    directly follow the last token. LayerNorm comes before each sub-layer and weights are drawn as in the Memformer;
    only the value projection starts at zero, as in the authors' code. The part of a token's features that counts as
    new is between 0 and 1 and has no gradient of its own, as there.

    Four more departures keep the tables bounded. The projections of a memory are of the LayerNorm of their input, and
    the features of a key have length 1. The memory tokens of a segment write one after the other: in the paper all of
    them change the table at once, so that M tokens with one key overshoot M times, and the next layer squares what it
    reads. And what is found is divided by its count only where that is above 1: divided by a count that is nearly 0,
    as in the paper, a small error becomes a large value, which the next write writes into the table. With the paper's
    rules, in Table 2's recipe on books, the loss was not finite from update 43, 53 and 53 on (three seeds).

    Args:
        config: The model's config.
    """

    config: AssociativeRecurrentMemoryTransformerConfig
    config_class: ClassVar[type[AssociativeRecurrentMemoryTransformerConfig]] = (
        AssociativeRecurrentMemoryTransformerConfig
    )

    def __init__(self, config: AssociativeRecurrentMemoryTransformerConfig) -> None:
        super().__init__(config)
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.d_model))
        self.positions = RotaryPositions(head_width=config.head_width)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.num_layers))
        self.memories = nn.ModuleList(
            AssociativeMemory(config.d_model, key_width=config.key_width) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self._initialise()

    def _initialise(self) -> None:
        super()._initialise()
        nn.init.normal_(self.memory_tokens)  # the scale of embedded tokens
        for memory in self._typed_memories:
            nn.init.zeros_(memory.value.weight)  # at first nothing is written, as in the authors' code

    @property
    def _typed_memories(self) -> list[AssociativeMemory]:
        return [cast(AssociativeMemory, memory) for memory in self.memories]  # or wrappers of them

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of features, 6 * key_width, and the width of all layers' tables, num_layers * (D + 1)."""
        return FEATURES_PER_COMPONENT * self.config.key_width, self.config.num_layers * (self.config.d_model + 1)

    def _tables(self, memory: Memory) -> tuple[Tensor, ...]:
        return memory.split(self.config.d_model + 1, dim=-1)

    def _read(self, x: Hidden, *, memory: Memory, num_tokens: TokenCounts | None) -> tuple[Hidden, Memory]:
        recompute_weights(self)
        length = x.shape[1]
        positions, keep_mask = self._make_positions_and_mask(length, num_tokens)
        frame = self.positions(positions, key_positions=positions)
        x = torch.cat([x, self.memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        tables = []
        for layer, associative, table in zip(self.layers, self._typed_memories, self._tables(memory), strict=True):
            x = layer(x + associative.read(x, table=table), frame=frame, keep_mask=keep_mask)
            tables.append(associative.write(x[:, length:], table=table))
        return self.norm(x[:, :length]), torch.cat(tables, dim=-1)

    def begin_segment(self, memory: Memory) -> SegmentState:
        """Return the memory, and an empty cache of keys and values for each layer."""
        if type(self) is not AssociativeRecurrentMemoryTransformer:  # a subclass may read otherwise
            return super().begin_segment(memory)
        return SegmentState([memory.clone(), *self._new_caches(len(memory))])

    def read_tokens(
        self, tokens: Segment, state: SegmentState, *, positions: Segment, num_tokens: int
    ) -> tuple[Hidden, SegmentState]:
        """Read the next tokens of a segment; arguments and result as in `NextTokenModel`."""
        if state.reads_again:
            return super().read_tokens(tokens, state, positions=positions, num_tokens=num_tokens)
        memory, *caches = state.rows
        caches = self._with_places(caches, num_tokens=num_tokens)
        places = positions.clamp(max=caches[0].shape[2] - 1)  # padding is written to the last place
        keep_mask = (torch.arange(num_tokens, device=places.device) <= places[..., None])[:, None]
        frame = self.positions(places, key_positions=places)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        x = self._embed(tokens)
        parts = zip(self.layers, self._typed_memories, self._tables(memory), caches[::2], caches[1::2], strict=True)
        for layer, associative, table, keys, values in parts:
            window = CacheWindow(keys, values, rows, places, num_keys=num_tokens)
            x = layer(x + associative.read(x, table=table), frame=frame, keep_mask=keep_mask, cache=window)
        return self.norm(x), SegmentState([memory, *caches])

    def _make_positions_and_mask(
        self, length: int, num_tokens: TokenCounts | None
    ) -> tuple[Int64[Tensor, "*B Q"], Bool[Tensor, "#B 1 Q Q"]]:
        """Return the positions of the segment and the memory tokens, and a mask, True where they may attend."""
        index = torch.arange(length + self.config.num_memory_tokens, device=self.device)
        keep_mask = index <= index[:, None]
        if num_tokens is None:
            return index, keep_mask[None, None]
        return place_behind_padding(keep_mask, end=length, num_padding=length - num_tokens)
