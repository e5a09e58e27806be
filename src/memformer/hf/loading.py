"""Checks of loaded weights, and the saved token that ends a document."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memformer.data.document_end import document_end_of
from memformer.data.tokenizer_training import has_tokenizer, load_tokenizer
from memformer.errors import CheckpointError


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


def saved_end_token(folder: Path) -> int | None:
    """Return the token that ends documents for the tokenizer that this library saved in a folder, if there is one."""
    try:
        return document_end_of(load_tokenizer(folder)) if has_tokenizer(folder) else None
    except CheckpointError:
        return None  # Not of this library, or damaged, which is an error where the tokenizer is loaded.
