"""The readout: predicts a segment from the hidden states of the one before it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer.models.config import MemformerConfig
from memformer.models.layers import DecoderLayer
from memformer.nn.attention import CacheWindow, HeadTokens, KeyValueCache, keep_mask_of
from memformer.nn.positions import PositionSchemes, RelativeFrame, RelativePositions, RotaryFrame, RotaryPositions
from memformer.shapes import Hidden, SegmentPadding


@dataclass
class Past:
    """What the decoder layers look back at: the previous segment, projected once.

    Attributes:
        keys_values: Placed keys and values of every layer, each (B, H, S, D/H).
        positions: (S,) or (B, S), ending with -1 at the last token before the boundary.
        keep_mask: True where the past may be looked at; None where there is no padding.
        slots: The written memory after its LayerNorm, if the decoder reads it.
        start: (B, D), the embedded token that the decoder starts from; None for `[BOS]`.
    """

    keys_values: list[tuple[HeadTokens, HeadTokens]]
    positions: Tensor
    keep_mask: Tensor | None
    slots: Tensor | None
    start: Tensor | None


def make_positions(config: MemformerConfig) -> PositionSchemes:
    """Return the position scheme that the config names."""
    if config.positions == "rotary":
        return RotaryPositions(head_width=config.head_width)
    return RelativePositions(num_heads=config.num_heads, head_width=config.head_width)


class Decoder(nn.Module):
    """Causal inside its segment; sees the past only through cross-attention (arXiv 2010.06891v2, section 3.1).

    Args:
        config: The model's config.
    """

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__()
        self.num_slots_read = config.num_slots if config.decoder_reads_memory else 0
        self.starts_from_last_token = config.decoder_starts_from_last_token
        self.positions = make_positions(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, bias=self.positions.biased_projections) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.memory_norm = nn.LayerNorm(config.d_model) if config.decoder_reads_memory else None

    def look_back(self, hidden: Hidden, *, padding_mask: SegmentPadding | None) -> Past:
        """Project the previous segment for every layer."""
        slots, start = None, None
        if self.starts_from_last_token:
            hidden, start = hidden[:, :-1], hidden[:, -1]
        if self.memory_norm is not None:
            slots = self.memory_norm(hidden[:, -self.num_slots_read :])
            hidden = hidden[:, : -self.num_slots_read]
        if padding_mask is None:
            positions = torch.arange(-hidden.shape[1], 0, device=hidden.device)
        else:
            keep = ~padding_mask
            positions = keep.cumsum(dim=-1) - 1 - keep.sum(dim=-1, keepdim=True)  # (B, S)
        frame = self.positions(positions, key_positions=positions)
        return Past(
            keys_values=[layer.look_back(hidden, frame=frame) for layer in self._typed_layers],
            positions=positions,
            keep_mask=keep_mask_of(padding_mask),
            slots=slots,
            start=start,
        )

    @property
    def _typed_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def forward(self, x: Float[Tensor, "B T D"], *, past: Past) -> Float[Tensor, "B T D"]:
        """Return features of each target from the targets before it and the past; `x` starts with `[BOS]`."""
        positions = torch.arange(x.shape[1], device=x.device)
        frame = self.positions(positions, key_positions=positions)
        return self._run_layers(x, past=past, frame=frame)

    def step(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        past: Past,
        caches: list[KeyValueCache],
        positions: Tensor,
        num_cached: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return features of further targets at `positions` (B, Q), those before them being in the caches.

        A position equal to the caches' length marks padding; its features mean nothing. `num_cached` is the number of
        targets before, where it is the same for all rows: then no key is read that has no token yet.
        """
        num_new = x.shape[1]
        num_keys = caches[0].keys.shape[2] if num_cached is None else num_cached + num_new
        key_positions = torch.arange(num_keys, device=x.device)
        frame = self.positions(positions, key_positions=key_positions, new_key_positions=positions)
        keep_mask = None
        if num_cached is None or num_new > 1:
            keep_mask = (key_positions <= positions[..., None])[:, None]  # (B, 1, Q, J)
        windows = [CacheWindow(cache, positions, num_keys) for cache in caches]
        return self._run_layers(x, past=past, frame=frame, keep_mask=keep_mask, caches=windows)

    def _run_layers(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        past: Past,
        frame: RotaryFrame | RelativeFrame,
        keep_mask: Tensor | None = None,
        caches: list[CacheWindow] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        past_frame = frame.towards(past.positions)
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                past=past.keys_values[index],
                past_frame=past_frame,
                past_keep_mask=past.keep_mask,
                slots=past.slots,
                frame=frame,
                keep_mask=keep_mask,
                cache=None if caches is None else caches[index],
            )
        return self.norm(x)
