"""Transformer-XL (arXiv 1901.02860); without memory, the plain Transformer decoder."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.models.baseline_configs import TransformerXLConfig
from memformer.models.layers import CausalLayer
from memformer.models.next_token import NextTokenModel, SegmentState, TokenCounts
from memformer.nn.attention import CacheWindow
from memformer.nn.distances import Distances, descending_sinusoids
from memformer.nn.positions import Frame
from memformer.shapes import Hidden, Memory, Segment

TokenSlots = Float[Tensor, "B J W"]


class TransformerXL(NextTokenModel):
    """Causal stack in which every layer attends to the segment and to its cached inputs for the M tokens before.

    The memory has M slots, one for each token, the oldest first, of width num_layers * D + 1: the inputs of each layer
    and a final 1. Slots for which the document has had no token yet are all zeros, and nothing attends to them.

    By definition of the model no gradient flows into the memory. This is the one exception to the rule that only the
    training loop detaches. So the gradient that replay passes back through time is zero.

    With `memory_length` 0 this is the plain Transformer decoder: full attention within the segment, which may be as
    long as the document.

    Departures from arXiv 1901.02860: LayerNorm comes before each sub-layer and the activation is GELU, as in the
    Memformer; every layer has its own u and v, like its own projection of distances; distances have no dropout.

    Args:
        config: The model's config.
    """

    config: TransformerXLConfig
    config_class: ClassVar[type[TransformerXLConfig]] = TransformerXLConfig

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.num_layers))
        self.distances = nn.ModuleList(
            Distances(config.d_model, num_heads=config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self._initialise()

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of slots M, one per remembered token, and their width, num_layers * D + 1."""
        return self.config.memory_length, self.config.num_layers * self.config.d_model + 1

    def _read(self, x: Hidden, *, memory: Memory, num_tokens: TokenCounts | None) -> tuple[Hidden, Memory]:
        memory = memory.detach()
        hidden, slots = self._run_layers(x, memory)
        return hidden, append_slots(memory, slots, num_new=num_tokens)

    def _run_layers(self, x: Hidden, memory: Memory) -> tuple[Hidden, TokenSlots]:
        """Return the hidden states of the tokens, and a detached slot for each token."""
        num_slots, length, width = memory.shape[1], x.shape[1], self.config.d_model
        sines = descending_sinusoids(num_slots + length, width=width, like=x)
        keep_mask = F.pad(is_present(memory), (0, length), value=True)[:, None, None, :] if num_slots else None
        layer_inputs = []
        for index, (layer, distances) in enumerate(zip(self.layers, self.distances, strict=True)):
            layer_inputs.append(x)
            past = _states_of_layer(index, memory, width=width).to(x.dtype) if num_slots else None
            x = layer(x, frame=distances(sines), keep_mask=keep_mask, past=past)
        return self.norm(x), make_slots(layer_inputs).detach().to(memory.dtype)

    def _attended(self, memory: Memory) -> Memory:
        """Return the slots that a segment's tokens attend to, in the order of their distances, empty ones first."""
        return memory

    def _keeps_keys(self) -> bool:
        """Return whether it is known what this class and its layers compute, so that keys and values can be kept."""
        return type(self) is TransformerXL and self._has_own_layers()

    def _has_own_layers(self) -> bool:
        layers = all(type(layer) is CausalLayer for layer in self.layers)
        return layers and all(type(distances) is Distances for distances in self.distances)

    def begin_segment(self, memory: Memory) -> SegmentState:
        """Return the keys and values of the memory for each layer."""
        if not self._keeps_keys():
            return super().begin_segment(memory)
        slots, width, dtype = self._attended(memory), self.config.d_model, self._embedded_bos().dtype
        caches: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, CausalLayer)
            past = _states_of_layer(index, slots, width=width).to(dtype)
            caches.extend(layer.project(past, frame=Frame()))
        return SegmentState([is_present(slots), *self._with_places(caches, num_tokens=1)])

    @property
    def _places_before_segment(self) -> int:
        return self.memory_shape[0]

    def _vectors_of_distances(self, num_keys: int) -> list[Float[Tensor, "H L E"]]:
        """Return R of each layer, for the distances L-1 .. 0."""
        sines = descending_sinusoids(num_keys, width=self.config.d_model, like=self._embedded_bos())
        return [distances.vectors(sines) for distances in self.distances if isinstance(distances, Distances)]

    def read_tokens(
        self, tokens: Segment, state: SegmentState, *, positions: Segment, num_tokens: int
    ) -> tuple[Hidden, SegmentState]:
        """Read the next tokens of a segment; arguments and result as in `NextTokenModel`."""
        if state.reads_again:
            return super().read_tokens(tokens, state, positions=positions, num_tokens=num_tokens)
        present, *caches = state.rows
        caches = self._with_places(caches, num_tokens=num_tokens)
        num_slots, num_places = present.shape[1], caches[0].shape[2] - 1
        vectors = state.shared
        if not vectors or vectors[0].shape[1] < num_places:
            vectors = self._vectors_of_distances(num_places)
        num_keys = num_slots + num_tokens
        places = (num_slots + positions).clamp(max=num_places)  # padding: behind all others
        key_places = torch.arange(num_keys, device=places.device)
        numbers = (num_keys - 1 - places[..., None] + key_places).clamp(0, num_keys - 1)[:, None]
        keep_mask = (key_places <= places[..., None])[:, None]
        keep_mask = keep_mask & F.pad(present, (0, num_tokens), value=True)[:, None, None, :]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        x = self._embed(tokens)
        for index, (layer, distances) in enumerate(zip(self.layers, self.distances, strict=True)):
            assert isinstance(distances, Distances)
            keys, values = caches[2 * index : 2 * index + 2]
            frame = distances.cached_frame(vectors[index][:, -num_keys:], numbers=numbers)
            window = CacheWindow(keys, values, rows, places, num_keys=num_keys)
            x = layer(x, frame=frame, keep_mask=keep_mask, cache=window)
        return self.norm(x), SegmentState([present, *caches], shared=vectors)


def _states_of_layer(index: int, slots: TokenSlots, *, width: int) -> Float[Tensor, "B J D"]:
    return slots[..., index * width : (index + 1) * width]


def make_slots(states: list[Float[Tensor, "B J D"]]) -> TokenSlots:
    """Return slots of the concatenated states of all layers, and a final 1."""
    return torch.cat([*states, torch.ones_like(states[0][..., :1])], dim=-1)


def is_present(memory: Memory) -> Bool[Tensor, "B K"]:
    """Return True at slots that hold a token."""
    return memory[..., -1] > 0


def append_slots(memory: Memory, slots: TokenSlots, *, num_new: TokenCounts | None) -> Memory:
    """Return the memory with the first `num_new` slots (None: all) appended and as many of its oldest removed."""
    num_slots, both = memory.shape[1], torch.cat([memory, slots], dim=1)
    if num_new is None:
        return both[:, slots.shape[1] :].contiguous()  # a view would keep all of `both` in memory
    return gather_slots(both, num_new[:, None] + torch.arange(num_slots, device=memory.device))


def gather_slots(slots: TokenSlots, places: Int64[Tensor, "B K"]) -> Memory:
    """Return the slots at these indices of each row."""
    return slots.gather(1, places[..., None].expand(-1, -1, slots.shape[-1]))
