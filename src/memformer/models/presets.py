"""Presets: named groups of Memformer config fields."""

from typing import Any, Literal, get_args

from memformer.errors import InputError

Preset = Literal["default", "paper", "recall"]

# In the paper the decoder starts from [BOS] and attends to itself and to the previous segment in turn.
PAPER_DECODER = {"decoder_attention": "separate", "decoder_start_tokens": 0}
# Measurements of each preset: experiments/RETENTION.md.
_CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    # The paper's memory: all slots start with the same forgetting speed, which is learned as part of their vectors.
    "paper": {"forgetting_speeds": (0.1, 0.1), "log_forgetting_speeds": False, **PAPER_DECODER},
    # A memory for facts: few tokens are written, each into its own slot, and only slots that are written forget.
    "recall": {
        "write_normalizer": "entmax15",
        "write_competition": True,
        "num_writer_heads": 1,
        "forgetting_when_written": True,
        # All slots start from one vector, so the model learns one rule for any number of free slots.
        "exchangeable_slots": True,
        "forgetting_speeds": (0.05, 0.05),
        "log_forgetting_speeds": False,
        "free_slot_bias": 8.0,
        # The recorded results of this preset are with the paper's decoder.
        **PAPER_DECODER,
    },
}
# The fields that presets set, with their defaults (a test compares them with `MemformerConfig`).
_DEFAULTS: dict[str, Any] = {
    "write_normalizer": "softmax",
    "write_competition": False,
    "num_writer_heads": None,
    "forgetting_when_written": False,
    "exchangeable_slots": False,
    "forgetting_speeds": (0.3, 1e-5),
    "log_forgetting_speeds": True,
    "free_slot_bias": 0.0,
    "decoder_attention": "joint",
    "decoder_start_tokens": 4,
}


def preset_fields(name: object) -> dict[str, Any]:
    """Return the fields of `MemformerConfig` that a preset sets; every preset sets the same fields.

    Raises:
        InputError: The preset does not exist.
    """
    if name not in get_args(Preset):
        raise InputError(f"preset ({name!r}) must be one of {', '.join(get_args(Preset))}")
    return {**_DEFAULTS, **_CHANGES[str(name)]}
