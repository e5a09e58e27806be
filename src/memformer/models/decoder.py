"""The readout: predicts a segment from the hidden states of the previous segment."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from memformer.models.config import MemformerConfig, MemoryEncoderConfig
from memformer.models.layers import DecoderLayer
from memformer.nn.attention import CacheWindow, HeadTokens, KeyValueCache, keep_mask_of
from memformer.nn.positions import PositionSchemes, RelativeFrame, RelativePositions, RotaryFrame, RotaryPositions
from memformer.shapes import Hidden, SegmentPadding


@dataclass
class Past:
    """The previous segment as inputs of the decoder's attention, projected once per segment.

    Attributes:
        keys_values: Keys (with positions applied) and values of every layer, each (B, H, S, D/H).
        positions: (S,) or (B, S), ending with -1 at the last token before the segment boundary.
        keep_mask: True where the past may be attended to. None: no padding.
        start: (B, D), the embedded token that the decoder starts from. None: `[BOS]`.
    """

    keys_values: list[tuple[HeadTokens, HeadTokens]]
    positions: Tensor
    keep_mask: Tensor | None
    start: Tensor | None

    def select_rows(self, rows: Int64[Tensor, " R"]) -> "Past":
        """Return the past of these rows."""
        return Past(
            keys_values=[(keys[rows], values[rows]) for keys, values in self.keys_values],
            positions=self.positions[rows] if self.positions.ndim == 2 else self.positions,
            keep_mask=None if self.keep_mask is None else self.keep_mask[rows],
            start=None if self.start is None else self.start[rows],
        )


def make_positions(config: MemoryEncoderConfig) -> PositionSchemes:
    """Return the position scheme of a config."""
    if config.positions == "rotary":
        return RotaryPositions(head_width=config.head_width)
    return RelativePositions(num_heads=config.num_heads, head_width=config.head_width, longest=config.segment_length)


class Decoder(nn.Module):
    """Decoder: causal in its segment, sees the past only as the previous segment's hidden states (v2, section 3.1).

    Args:
        config: The model's config.
    """

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__()
        self.starts_from_last_token = config.decoder_starts_from_last_token
        self.is_joint = config.decoder_attention == "joint"
        self.positions = make_positions(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, bias=self.positions.biased_projections) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def precompute_past(self, hidden: Hidden, *, padding_mask: SegmentPadding | None) -> Past:
        """Return the keys and values of the previous segment for every layer."""
        start = None
        if self.starts_from_last_token:
            hidden, start = hidden[:, :-1], hidden[:, -1]
        if padding_mask is None:
            positions = torch.arange(-hidden.shape[1], 0, device=hidden.device)
        else:
            keep = ~padding_mask
            positions = keep.cumsum(dim=-1) - 1 - keep.sum(dim=-1, keepdim=True)  # (B, S)
        frame = self.positions(positions, key_positions=positions)
        return Past(
            keys_values=[layer.precompute_past(hidden, frame=frame) for layer in self._typed_layers],
            positions=positions,
            keep_mask=keep_mask_of(padding_mask),
            start=start,
        )

    @property
    def _typed_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def forward(self, x: Float[Tensor, "B T D"], *, past: Past) -> Float[Tensor, "B T D"]:
        """Return the features of each target, from earlier targets and the past; `x` begins with the start."""
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
        """Return the features of new targets at `positions` (B, Q); earlier targets are in the caches.

        A position equal to the caches' length marks padding; its features are meaningless. `num_cached` is the number
        of earlier targets, if it is the same for all rows; then empty cache positions are not read.
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
        past_frame = frame.prepare(x).with_keys(past.positions)
        if self.is_joint:
            keep_mask = _joint_keep_mask(past, x, keep_mask, caches)
            frame = frame.with_earlier_keys(past.positions)
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                past=past.keys_values[index],
                past_frame=past_frame,
                past_keep_mask=past.keep_mask,
                frame=frame,
                keep_mask=keep_mask,
                cache=None if caches is None else caches[index],
            )
        return self.norm(x)


def _joint_keep_mask(
    past: Past, x: Float[Tensor, "B Q D"], keep_mask: Tensor | None, caches: list[CacheWindow] | None
) -> Tensor | None:
    """Return the mask of one attention to the past and to the targets themselves; None if nothing is masked."""
    num_queries = x.shape[1]
    if caches is None and num_queries > 1:
        keep_mask = torch.ones(num_queries, num_queries, dtype=torch.bool, device=x.device).tril()[None, None]
    if keep_mask is None and past.keep_mask is None:
        return None
    num_own = num_queries if caches is None else caches[0].num_keys
    parts = []
    for part, num_keys in ((past.keep_mask, past.positions.shape[-1]), (keep_mask, num_own)):
        part = x.new_ones(1, dtype=torch.bool) if part is None else part
        parts.append(part.expand(x.shape[0], 1, num_queries, num_keys))
    return torch.cat(parts, dim=-1)
