"""The readout: predicts a segment from the hidden states of the previous segment."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.models.config import MemformerConfig, MemoryEncoderConfig
from memformer.models.layers import DecoderLayer
from memformer.nn.attention import CacheWindow, HeadTokens, KeyValueCache, join_keys_values, keep_mask_of
from memformer.nn.positions import (
    PositionSchemes,
    RelativeFrame,
    RelativePositions,
    RotaryFrame,
    RotaryPositions,
    mask_as_numbers,
)
from memformer.shapes import Hidden, SegmentPadding


@dataclass
class Past:
    """The previous segment as inputs of the decoder's attention, projected once per segment.

    These are its hidden states and, behind them, the tokens that the decoder reads again before its start.

    Attributes:
        keys_values: Keys (with positions applied) and values of every layer, each (B, H, P, D/H).
        positions: (P,) or (B, P), counted from -1 at the last token before the segment boundary.
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
        self.num_start_tokens = config.decoder_start_tokens
        self.is_joint = config.decoder_attention == "joint"
        self.positions = make_positions(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, bias=self.positions.biased_projections) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def precompute_past(self, hidden: Hidden, *, padding_mask: SegmentPadding | None) -> Past:
        """Return the keys and values of the previous segment for every layer."""
        length = hidden.shape[1] - self.num_start_tokens
        hidden, start = hidden[:, :length], hidden[:, length:]
        if padding_mask is None:
            positions = torch.arange(-length, 0, device=hidden.device)
        else:
            keep = ~padding_mask
            positions = keep.cumsum(dim=-1) - 1 - keep.sum(dim=-1, keepdim=True)  # (B, S)
        frame = self.positions(positions, key_positions=positions)
        past = Past(
            keys_values=[layer.precompute_past(hidden, frame=frame) for layer in self._typed_layers],
            positions=positions,
            keep_mask=keep_mask_of(padding_mask),
            start=start[:, -1] if self.num_start_tokens else None,
        )
        return past if self.num_start_tokens < 2 else self._read_again(start[:, :-1], past, padding_mask)

    def _read_again(self, x: Float[Tensor, "B Q D"], past: Past, padding_mask: Bool[Tensor, "B S"] | None) -> Past:
        """Return the past with the embedded tokens x before the start behind it, which every layer reads as its own."""
        num_tokens, num_states = x.shape[1], past.positions.shape[-1]
        positions = torch.arange(-num_tokens, 0, device=x.device)
        frame = self.positions(positions, key_positions=positions).prepare(x)
        frame_of_all = frame.with_earlier_keys(past.positions)
        keep_own = None
        if padding_mask is not None or num_states <= num_tokens:  # a segment may have fewer tokens
            num_read = positions.new_full((1,), num_states) if padding_mask is None else (~padding_mask).sum(dim=-1)
            keep_own = (positions > -num_read[:, None])[:, None, None].expand(x.shape[0], -1, -1, -1)  # (B, 1, 1, Q)
        causal = _causal_mask(num_tokens, device=x.device)
        keep_mask = _join_masks(past, causal if keep_own is None else keep_own & causal, queries_of=x)
        keys_values = []
        for layer, earlier in zip(self._typed_layers, past.keys_values, strict=True):
            keys_values.append(join_keys_values(earlier, layer.project(x, frame=frame)))
            if len(keys_values) < len(self.layers):  # the last layer's output is not used
                x = layer(
                    x, past=earlier, past_frame=frame, past_keep_mask=None, frame=frame_of_all, keep_mask=keep_mask
                )
        return Past(
            keys_values=keys_values,
            positions=torch.cat([past.positions, positions.expand(*past.positions.shape[:-1], -1)], dim=-1),
            keep_mask=None if keep_own is None else _join_masks(past, keep_own, queries_of=x[:, :1]),
            start=past.start,
        )

    @property
    def _typed_layers(self) -> list[DecoderLayer]:
        # A wrapper of a layer (torch.compile, activation checkpointing) passes the layer's methods on.
        return [cast(DecoderLayer, layer) for layer in self.layers]

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        past: Past,
        caches: list[KeyValueCache] | None = None,
        positions: Tensor | None = None,
        num_cached: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Return the features of each target, from earlier targets and the past; `x` begins with the start.

        With caches, which hold the keys and values of earlier targets, the targets are those at `positions` (B, Q). A
        position equal to the caches' length marks padding; its features are meaningless. `num_cached` is the number of
        earlier targets, if it is the same for all rows; then empty cache positions are not read.
        """
        if caches is not None and positions is not None:
            return self._step(x, past=past, caches=caches, positions=positions, num_cached=num_cached)
        positions = torch.arange(x.shape[1], device=x.device)
        frame = self.positions(positions, key_positions=positions)
        return self._run_layers(x, past=past, frame=frame)

    def _step(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        past: Past,
        caches: list[KeyValueCache],
        positions: Tensor,
        num_cached: int | None,
    ) -> Float[Tensor, "B Q D"]:
        num_new = x.shape[1]
        num_keys = caches[0].keys.shape[2] if num_cached is None else num_cached + num_new
        key_positions = torch.arange(num_keys, device=x.device)
        frame = self.positions(positions, key_positions=key_positions, new_key_positions=positions)
        keep_mask = None
        if num_cached is None or num_new > 1:
            keep_mask = (key_positions <= positions[..., None])[:, None]  # (B, 1, Q, J)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        windows = [CacheWindow(cache.keys, cache.values, rows, positions, num_keys) for cache in caches]
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
            if keep_mask is None and caches is None and x.shape[1] > 1:
                keep_mask = _causal_mask(x.shape[1], device=x.device)
            if keep_mask is None and past.keep_mask is not None:
                num_own = x.shape[1] if caches is None else caches[0].num_keys
                keep_mask = x.new_ones(1, 1, 1, num_own, dtype=torch.bool)
            if keep_mask is not None:
                keep_mask = _join_masks(past, keep_mask, queries_of=x)
            frame = frame.with_earlier_keys(past.positions)
        if keep_mask is not None and caches is not None:
            keep_mask = mask_as_numbers(keep_mask, like=caches[0].keys)
        for index, layer in enumerate(self.layers):
            # Compiled layers are for the fixed shapes of whole segments; a step with caches has one for each token.
            is_step = caches is not None and layer._compiled_call_impl is not None
            call = layer._call_impl if is_step else layer
            x = call(
                x,
                past=past.keys_values[index],
                past_frame=past_frame,
                past_keep_mask=past.keep_mask,
                frame=frame,
                keep_mask=keep_mask,
                cache=None if caches is None else caches[index],
            )
        return self.norm(x)


def _causal_mask(length: int, *, device: torch.device) -> Bool[Tensor, "1 1 Q Q"]:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def _join_masks(
    past: Past, keep_own: Bool[Tensor, "#B 1 #Q Y"], *, queries_of: Float[Tensor, "B Q D"]
) -> Bool[Tensor, "#B 1 Q J"]:
    """Return the mask of one attention to the past and, behind it, to the tokens of another mask.

    Without padding it is the same for all rows and returned once: attention turns it into numbers, which every layer
    keeps for its backward pass.
    """
    keep_past = past.keep_mask
    if keep_past is None:
        keep_past = keep_own.new_ones(1, 1, 1, past.positions.shape[-1])
    rows, num_queries = max(keep_past.shape[0], keep_own.shape[0]), queries_of.shape[1]
    return torch.cat([part.expand(rows, 1, num_queries, -1) for part in (keep_past, keep_own)], -1)
