"""Checks of loaded weights, and the saved token that ends a document."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from memformer.data.document_end import document_end_of
from memformer.data.tokenizer_training import has_tokenizer, load_tokenizer
from memformer.errors import CheckpointError, InputError

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_IF_THERE = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def check_all_are_loaded(model: PreTrainedModel, info: Mapping[str, Any], *, start: str) -> None:
    """Check that a folder had all weights whose name begins so; transformers leaves others undefined.

    Raises:
        CheckpointError: Weights were missing or of another shape.
    """
    missing = sorted(name for name in info["missing_keys"] if name.startswith(start))
    if missing:
        raise CheckpointError(
            f"{model.name_or_path} lacks {len(missing)} weights of this model; the first is {missing[0]!r}"
        )
    changed = sorted(each for each in info["mismatched_keys"] if each[0].startswith(start))
    if changed:
        name, found, expected = changed[0]
        raise CheckpointError(
            f"{model.name_or_path} has {len(changed)} weights of another shape; the first is {name!r}, "
            f"{tuple(found)} instead of {tuple(expected)}"
        )


def check_is_on_one_device(device_map: Mapping[str, Any]) -> None:
    """Check that a whole model is on one device: a session calls its parts, whose weights must be there.

    Raises:
        InputError: It is divided, or weights stay on disk.
    """
    devices = sorted({str(device) for device in device_map.values()})
    if len(devices) > 1 or "disk" in devices:
        raise InputError(
            f"device_map puts weights on {', '.join(devices)}; the model is not called layer by layer, so all of them "
            "must be on one device: device_map={'': device}"
        )


def saved_end_token(name: str, options: Mapping[str, Any]) -> int | None:
    """Return the token that ends documents for the tokenizer that this library saved beside a model, if there is one.

    Args:
        name: A folder or a model of the hub; empty if the model was made of given weights.
        options: Arguments of `from_pretrained`, some of which say where its files are.
    """
    where = {option: options[option] for option in _WHERE if options.get(option) is not None}
    found = [cached_file(name, file, **where, **_IF_THERE) for file in _TOKENIZER_FILES] if name else [None]
    if found[0] is None:
        return None
    folder = Path(found[0]).parent
    try:
        return document_end_of(load_tokenizer(folder)) if has_tokenizer(folder) else None
    except CheckpointError:
        return None  # Not of this library, or damaged, which is an error where the tokenizer is loaded.
