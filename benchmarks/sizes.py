"""Config of the model that the benchmarks measure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memformer import MemformerConfig

# As in the paper, so that figures of different versions can be compared. Named here and not
# taken from the presets, because `checkouts.py` runs older checkouts, which do not know these fields.
PAPER_DECODER = {
    name: value
    for name, value in {
        "decoder_attention": "separate",
        "decoder_starts_from_last_token": False,  # until it was replaced by the next
        "decoder_start_tokens": 0,
    }.items()
    if name in {field.name for field in dataclasses.fields(MemformerConfig)}
}
SIZES = ("width", "heads", "layers", "segment_length", "num_slots")


def half_and_half(
    *,
    width: int,
    layers: int,
    segment_length: int,
    heads: int = 4,
    num_slots: int = 32,
    decoder: Mapping[str, Any] = PAPER_DECODER,
    **further: Any,
) -> MemformerConfig:
    """Return a config with half of the `layers` in each stack; bytes and the paper's decoder by default."""
    return MemformerConfig(
        **decoder,
        d_model=width,
        num_heads=heads,
        d_ff=4 * width,
        num_encoder_layers=layers // 2,
        num_decoder_layers=layers // 2,
        segment_length=segment_length,
        num_slots=num_slots,
        **further,
    )


def sized(options: Mapping[str, Any]) -> MemformerConfig:
    """Return that config in the sizes given by a benchmark's options."""
    return half_and_half(**{key: options[key] for key in SIZES})
