"""Transformer-XL (arXiv 1901.02860), and without its memory the plain Transformer decoder."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.models.baseline_configs import TransformerXLConfig
from memformer.models.layers import CausalLayer
from memformer.models.next_token import NextTokenModel, TokenCounts
from memformer.nn.distances import Distances, descending_sinusoids
from memformer.shapes import AnyMemory, Hidden

TokenSlots = Float[Tensor, "B J W"]


class TransformerXL(NextTokenModel):
    """A causal stack in which every layer attends to the segment and to what entered it for the M tokens before.

    The memory has M slots, one for each token, the oldest first, of width num_layers * D + 1: the states that entered
    each layer, and last a 1; or only zeros where the document has not had so many tokens yet, which nothing attends to.

    By the definition of the model no gradient flows into what is remembered: this is where a model detaches, against
    the rule that only the training loop does. So the gradient that replay carries backwards is zero.

    With `memory_length` 0 this is the plain Transformer decoder: full attention within the segment, which may be as
    long as the document.

    Departures from arXiv 1901.02860: LayerNorm stands before each part, and GELU within, as in the Memformer; u and v
    belong to each layer, as the projection of distances does; distances are not dropped out.

    Args:
        config: What to build.
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
        """A slot for each remembered token, and num_layers * D + 1."""
        return self.config.memory_length, self.config.num_layers * self.config.d_model + 1

    def _read(self, x: Hidden, *, memory: AnyMemory, num_tokens: TokenCounts | None) -> tuple[Hidden, AnyMemory]:
        memory = memory.detach()
        hidden, slots = self._run_layers(x, memory)
        return hidden, append_slots(memory, slots, num_new=num_tokens)

    def _run_layers(self, x: Hidden, memory: AnyMemory) -> tuple[Hidden, TokenSlots]:
        """Return the states of the tokens, and a slot for each of them, detached."""
        num_slots, length, width = memory.shape[1], x.shape[1], self.config.d_model
        sines = descending_sinusoids(num_slots + length, width=width, like=x)
        keep_mask = F.pad(is_present(memory), (0, length), value=True)[:, None, None, :] if num_slots else None
        entered = []
        for index, (layer, distances) in enumerate(zip(self.layers, self.distances, strict=True)):
            entered.append(x)
            past = memory[..., index * width : (index + 1) * width].to(x.dtype) if num_slots else None
            x = layer(x, frame=distances(sines), keep_mask=keep_mask, past=past)
        return self.norm(x), make_slots(entered).detach().to(memory.dtype)


def make_slots(states: list[Float[Tensor, "B J D"]]) -> TokenSlots:
    """Return slots that hold, for each layer, one of these states."""
    return torch.cat([*states, torch.ones_like(states[0][..., :1])], dim=-1)


def is_present(memory: AnyMemory) -> Bool[Tensor, "B K"]:
    """Return True at slots that hold something."""
    return memory[..., -1] > 0


def append_slots(memory: AnyMemory, slots: TokenSlots, *, num_new: TokenCounts | None) -> AnyMemory:
    """Return the memory after the first `num_new` of these slots (None: all) came in at its end, and as many left."""
    num_slots, both = memory.shape[1], torch.cat([memory, slots], dim=1)
    if num_new is None:
        return both[:, slots.shape[1] :].contiguous()  # a view would hold all of both as long as it lives
    return gather_slots(both, num_new[:, None] + torch.arange(num_slots, device=memory.device))


def gather_slots(slots: TokenSlots, places: Int64[Tensor, "B K"]) -> AnyMemory:
    """Return the slots at these places of each row."""
    return slots.gather(1, places[..., None].expand(-1, -1, slots.shape[-1]))
