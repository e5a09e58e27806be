"""Config of the model that the benchmarks measure."""

from collections.abc import Mapping
from typing import Any

from memformer import MemformerConfig

SIZES = ("width", "heads", "layers", "segment_length", "num_slots")


def half_and_half(
    *, width: int, layers: int, segment_length: int, heads: int = 4, num_slots: int = 32, **further: Any
) -> MemformerConfig:
    """Return the paper's design with half of the `layers` in the encoder and half in the decoder; bytes by default."""
    return MemformerConfig.from_preset(
        "paper",
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
