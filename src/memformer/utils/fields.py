"""Conversion of the fields of configs to their annotated types, from Python values and from text."""

import contextlib
import dataclasses
import os
import types
from collections.abc import Iterable, Mapping, Set
from datetime import date
from typing import Any, Literal, Union, get_args, get_origin

from memformer.errors import InputTypeError
from memformer.utils.checks import check_choice, check_flag, shown, to_integer, to_number
from memformer.utils.yaml_files import parse_yaml


def convert_fields(config: Any, *, prefix: str = "") -> None:
    """Convert the fields of a frozen dataclass, in place, to the types of their annotations.

    Numbers of any type become `int` and `float`, paths become `str`, and any iterable becomes the tuple or list of the
    annotation. The config can then be written as YAML and JSON.

    Args:
        config: The config, in its `__post_init__`.
        prefix: Prefix of the names in messages, for example "training.".

    Raises:
        InputError: A value is not one of the valid words.
        InputTypeError: A value has the wrong type.
    """
    for field in dataclasses.fields(config):
        value = convert(f"{prefix}{field.name}", getattr(config, field.name), field.type)
        object.__setattr__(config, field.name, value)


def convert(name: str, value: object, hint: Any) -> Any:
    """Return a value as the type that an annotation describes.

    Args:
        name: The value's name in messages.
        value: The value.
        hint: int, float, bool, str, a class, a `Literal` of words, a tuple or a list of these, or a union with None.

    Raises:
        InputError: The value is not one of the valid words, or there are too few or too many of them.
        InputTypeError: The value has the wrong type.
    """
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        return None if value is None and type(None) in get_args(hint) else _convert_union(name, value, hint)
    if origin is Literal:
        check_choice(name, value, get_args(hint))
        return next(choice for choice in get_args(hint) if choice == value)
    if origin in {tuple, list}:
        return _convert_several(name, value, hint)
    if hint is bool:
        return check_flag(name, value)
    if hint is int:
        converted: object = to_integer(value)
    elif hint is float:
        converted = to_number(value)
    elif hint is str:
        converted = _to_text(name, value)
    else:
        converted = value if isinstance(value, hint) else None
    if converted is None:
        advice = " (in YAML, put it in quotes)" if hint is str and isinstance(value, int | float | date) else ""
        raise InputTypeError(f"{name} ({shown(value)}) must be {_KINDS.get(hint, f'of class {hint.__name__}')}{advice}")
    return converted


_KINDS = {int: "an integer", float: "a number", str: "a text"}
# Begins a text of the command line that is not to be read as YAML; no argument of a command can contain it.
VERBATIM = "\0"


# Values that Python can iterate over, but whose items are no list.
_NO_LISTS = (str, bytes, Mapping, Set)


def _convert_union(name: str, value: object, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    several = [kind for kind in kinds if get_origin(kind) in {tuple, list}]
    is_several = isinstance(value, Iterable) and not isinstance(value, _NO_LISTS)
    return convert(name, value, several[0] if several and is_several else kinds[0])


def _convert_several(name: str, value: object, hint: Any) -> Any:
    kinds = get_args(hint)
    what = {int: "integers", float: "numbers", str: "texts"}[kinds[0]]
    if not isinstance(value, Iterable) or isinstance(value, _NO_LISTS) or getattr(value, "ndim", 1) != 1:
        raise InputTypeError(f"{name} ({shown(value)}) must be a list of {what}")
    values = [convert(name, each, kinds[0]) for each in value]
    if get_origin(hint) is list:
        return values
    if kinds[-1] is not Ellipsis and len(values) != len(kinds):
        raise InputTypeError(f"{name} ({shown(values)}) must be {len(kinds)} {what}")
    return tuple(values)


def _to_text(name: str, value: object) -> str | None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputTypeError(f"{name} ({shown(text)}) must be UTF-8; it holds other bytes") from error
    return str(text).removeprefix(VERBATIM)


def convert_text(name: str, value: object, hint: Any) -> Any:
    """Return a value of a YAML file or of the command line, as `convert` does; numbers may be text ("1e-3").

    Raises:
        InputError: The value is not one of the valid words, or there are too few or too many of them.
        InputTypeError: The value has the wrong type.
    """
    return convert(name, _parse(value) if not is_text(hint) else value, hint)


def is_text(hint: Any) -> bool:
    """Return whether an annotation allows a text, which must not be parsed as a number."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return True
    return hint is str or any(is_text(kind) for kind in kinds if kind is not Ellipsis)


def _parse(value: object) -> object:
    if isinstance(value, list):
        return [each if isinstance(each, list) else _parse(each) for each in value]
    # YAML reads a text without content, such as an unset shell variable or a comment, as null.
    if not isinstance(value, str) or not value.partition("#")[0].strip():
        return value
    with contextlib.suppress(ValueError):
        value = parse_yaml(value)
        if isinstance(value, str):
            value = float(value)  # "inf"
    return value
