"""Configs that people write."""

from pathlib import Path
from typing import Any

from memformer.errors import InputError
from memformer.files import parse_yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: The file is missing, is not YAML, or holds no mapping.
    """
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"config {path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"config {path} holds a {type(value).__name__}; it must be a mapping of keys to values")
    return value
