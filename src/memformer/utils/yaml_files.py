"""Safe parsing of user-written YAML, with one-line error messages."""

from pathlib import Path
from typing import Any

import yaml

from memformer.errors import InputError


def parse_yaml(text: str) -> Any:
    """Return the value in a YAML text.

    Raises:
        ValueError: The text is not valid YAML; the message is one line.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML raises these for malformed numbers, dates and tagged values, and for nesting that is too deep.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"a value in it is malformed: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: The file is missing, is not YAML, or does not contain a mapping.
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
