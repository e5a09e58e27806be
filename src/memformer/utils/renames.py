"""Changes of configs since version 0.1: names that were renamed or removed, and defaults that were changed.

Configs, checkpoints, sessions and models with the old names can still be read. A config with old names causes one
warning that lists the new names. From version 0.3 on, old keys in user-written configs will be refused; files written
by the library itself will remain readable, also if they lack a key (`with_first_defaults`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from memformer.errors import InputError

# For each section of a run config: old key to new key.
KEYS: dict[str, dict[str, str]] = {
    "model": {
        "free_slot_eagerness": "free_slot_bias",
        "place_embedding": "position_embedding",
        "decoder_starts_from_last_token": "decoder_start_tokens",
    },
    "training": {"write_price": "write_penalty"},
}
# (section, key as given): old value, in lower case, to new value.
VALUES: dict[tuple[str, str], dict[str, Any]] = {
    ("training", "sharding"): {"moments": "optimizer_state"},
    ("model", "decoder_starts_from_last_token"): {
        **dict.fromkeys(("true", "yes", "on", "y"), 1),
        **dict.fromkeys(("false", "no", "off", "n"), 0),
    },
}
# (section, key) of a removed key: its default, and the behaviour that is now fixed. The key is dropped. Any other value
# causes a message, or an error if the key is in _DECIDES_WEIGHTS.
REMOVED: dict[tuple[str, str], tuple[Any, str]] = {
    ("model", "decoder_reads_memory"): (False, "the decoder attends to the encoder's hidden states only"),
    ("model", "embedding_dropout"): (None, "model.dropout also applies to the embedded tokens"),
    ("training", "write_price_below"): (
        0.1,
        "the write penalty applies where the loss is below 0.1 nats per token",
    ),
    ("training", "skip_above"): (None, "an update is skipped only if its loss or gradient is not finite"),
}
# Removed keys that change the output of a trained model.
_DECIDES_WEIGHTS = {("model", "decoder_reads_memory")}
# Old to new name of a weight.
TENSORS = {
    "memory_writer.free_slot_eagerness": "memory_writer.free_slot_bias",
    "encoder.place_embedding.weight": "encoder.position_embedding.weight",
}
# For each model type, the fields that were added after version 0.1, or whose default was changed, if an older file that
# lacks the field means another value than today's default.
_FIRST_DEFAULTS: dict[str, dict[str, Any]] = {"memformer": {"decoder_attention": "separate", "decoder_start_tokens": 0}}
_FIRST_MODEL_KEYS = {new: old for old, new in KEYS["model"].items()}
_FIRST_MODEL_VALUES = {"decoder_start_tokens": {1: True, 0: False}}


def is_old_model_key(key: str) -> bool:
    """Return whether a key of model configs was renamed or removed since version 0.1."""
    return key in KEYS["model"] or ("model", key) in REMOVED


def _new_value(section: str, key: str, value: Any) -> Any:
    """Return the present value of a key, as given, whose values were renamed."""
    values = VALUES.get((section, key))
    return value if values is None or not isinstance(value, (str, bool)) else values.get(str(value).lower(), value)


def update_section(section: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a section of a run config with the current names, and a message per changed name.

    Args:
        section: "model" or "training".
        fields: The section's keys and values.

    Raises:
        InputError: An old key and its new key are both given, or a removed key has a value that is no longer supported.
    """
    updated: dict[str, Any] = {}
    notes = []
    for key, value in fields.items():
        if (section, key) in REMOVED:
            kept, now = REMOVED[section, key]
            if value != kept:
                if (section, key) in _DECIDES_WEIGHTS:
                    raise InputError(f"{section}.{key} ({value!r}) was removed in version 0.2: {now}; use version 0.1")
                notes.append(f"{section}.{key} ({value!r}) was removed: {now}")
            continue
        new = KEYS.get(section, {}).get(key, key)
        if new != key:
            if new in fields:
                raise InputError(f"{section}.{key} and {section}.{new} are both given; {key} is the old name of {new}")
            notes.append(f"{section}.{key} is now {section}.{new}")
        new_value = _new_value(section, key, value)
        if new_value is not value:  # NaN differs from itself
            notes.append(f"{section}.{new}: {value} is now {new_value}")
        updated[new] = new_value
    return updated, notes


def with_first_defaults(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config that the library wrote, with the fields that it did not have yet.

    The library writes every field, so a missing one had the value that was then the only one.
    """
    first = _FIRST_DEFAULTS.get(model_type, {})
    return {**{key: value for key, value in first.items() if _FIRST_MODEL_KEYS.get(key) not in fields}, **fields}


def run_config_with_first_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run config that a run wrote, with the fields of the model that it did not have yet."""
    if not isinstance(fields.get("model"), Mapping):
        return dict(fields)
    return {**fields, "model": with_first_defaults(str(fields.get("model_type", "memformer")), fields["model"])}


def first_default(model_type: str, key: str, *, default: Any) -> Any:
    """Return the first default of a field of a model config; fingerprints are computed from the first defaults."""
    return _FIRST_DEFAULTS.get(model_type, {}).get(key, default)


def update_run_config(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a run config with the current names, and a message per changed name.

    Raises:
        InputError: See `update_section`.
    """
    updated, notes = dict(fields), []
    for section in {*KEYS, *(section for section, _ in REMOVED)}:
        if isinstance(fields.get(section), Mapping):
            updated[section], section_notes = update_section(section, fields[section])
            notes += section_notes
    return updated, sorted(notes)


def update_options(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return options of `memformer train` under the present names, and a sentence for each option that was changed.

    Raises:
        InputError: An option was removed.
    """
    updated: list[str] = []
    notes = []
    before = ("", "")  # the section and key of the option that the next word is the value of
    for word in options:
        name, equals, value = word.partition("=")
        section, dot, key = name.removeprefix("--").partition(".")
        if not (name.startswith("--") and dot):
            section_and_key, value = before, word
        else:
            if (section, key) in REMOVED:
                raise InputError(f"{name} was removed in version 0.2: {REMOVED[section, key][1]}")
            new = KEYS.get(section, {}).get(key, key)
            if new != key:
                notes.append(f"{name} is now --{section}.{new}")
            section_and_key, name = (section, key), f"--{section}.{new}"
        new_value = str(_new_value(*section_and_key, value))
        if new_value != value:
            notes.append(f"--{'.'.join(section_and_key)} {value} is now {new_value}")
        updated.append(new_value if section_and_key == before else f"{name}{equals}{new_value}")
        before = section_and_key if dot and name.startswith("--") and not equals else ("", "")
    return updated, notes


def old_names_sentence(owner: str, notes: Sequence[str]) -> str:
    """Return the warning about a config that uses old names."""
    return f"{owner} uses names from version 0.1, which will be refused from version 0.3 on: {'; '.join(notes)}"


def first_model_field(key: str, value: Any) -> tuple[str, Any]:
    """Return the original name and value of a field of a model config; fingerprints are computed from the originals."""
    values = _FIRST_MODEL_VALUES.get(key)
    return _FIRST_MODEL_KEYS.get(key, key), value if values is None else values.get(value, value)
