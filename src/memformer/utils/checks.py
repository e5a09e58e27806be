"""Checks of user input, and of what a user's model computes, with one error message per rule.

A number may have any type: `int`, `float`, a numpy number, or an array or tensor with one element and no dimension.
The functions return it as a plain `int` or `float`, which can be written as JSON and YAML.
"""

import difflib
import math
import operator
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from memformer.errors import InputError, InputTypeError
from memformer.utils.words import with_article

# Larger values can only be typos or damage. The product of two values up to this limit still fits into int64.
LARGEST = 1 << 24

# Types of arguments: integers (4, numpy.int64(4), 4.0), numbers, and one integer or several of them.
Integer = SupportsIndex | SupportsFloat
Number = SupportsFloat
Integers = Integer | Iterable[Integer]


def to_integer(value: object) -> int | None:
    """Return a value as an int; None if it is not an integer (a float with an integer value is one)."""
    if not _may_be_number(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # other types raise TypeError
    except TypeError:
        number = to_number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else None


def to_number(value: object) -> float | int | None:
    """Return a value as an int or float; None if it is not a number."""
    if not _may_be_number(value):
        return None
    if type(value) is float:
        return value
    if type(value) is int:
        # Larger integers have no float, so bounds and `math.isfinite` could not be checked.
        return value if abs(value) <= sys.float_info.max else math.inf if value > 0 else -math.inf
    try:
        return float(value)  # type: ignore[arg-type]  # other types raise TypeError
    except (TypeError, ValueError, OverflowError):
        return None


def _may_be_number(value: object) -> bool:
    if isinstance(value, bool | str | bytes | bytearray):
        return False
    return getattr(value, "ndim", 0) == 0 and "bool" not in str(getattr(value, "dtype", ""))


_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 20
_REPR.maxstring = _REPR.maxother = 200


def shown(value: object) -> str:
    """Return a value as text for a message: its `repr`, shortened if it is long or deeply nested."""
    return _REPR.repr(value)


def check_likelihood(*nlls: NDArray[np.floating[Any]] | Sequence[float]) -> None:
    """Check that negative log-likelihoods, which a model has computed, are finite.

    Raises:
        InputError: One of them is not.
    """
    if not all(np.isfinite(nll).all() for nll in nlls):
        raise InputError("the negative log-likelihood is not finite: the model's weights or its memory are broken")


def refuse_unknown_keys(given: Iterable[str], *, valid: Iterable[str], owner: str) -> None:
    """Check that all given keys are valid.

    Raises:
        InputError: A key is unknown; the message names the nearest valid one.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid)}"
            raise InputError(f"unknown key {key!r} in {owner}; {hint}")


def check_type(name: str, value: object, kind: type, *, hint: str = "") -> None:
    """Check the class of an argument, before its attributes are read.

    Args:
        name: The argument's name in the error message.
        value: The argument.
        kind: The class that it must have.
        hint: Advice at the end of the message.

    Raises:
        InputTypeError: The argument is of another class.
    """
    if not isinstance(value, kind):
        raise InputTypeError(
            f"{name} is of class {type(value).__name__}; it must be {with_article(kind.__name__)}{hint}"
        )


def utf_8_of(text: str, name: str) -> bytes:
    """Return a text in UTF-8; `name` is what holds it, in messages.

    Raises:
        InputError: The text has a lone surrogate, which JSON can hold and UTF-8 cannot.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds a lone surrogate at character {error.start}; it is not valid text") from error


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return a value as an int, after checking that it is an integer from `minimum` to `maximum`.

    Args:
        name: The value's name in the error message.
        value: The value.
        minimum: Smallest valid integer.
        maximum: Largest valid integer; None for no limit.

    Raises:
        InputError: The value is below `minimum` or above `maximum`.
        InputTypeError: The value is not an integer.
    """
    integer = to_integer(value)
    if integer is None:
        raise InputTypeError(f"{name} ({shown(value)}) must be an integer")
    if maximum is not None and not minimum <= integer <= maximum:
        raise InputError(f"{name} ({integer}) must be from {minimum} to {maximum}")
    if integer < minimum:
        raise InputError(f"{name} ({integer}) must be at least {minimum}")
    return integer


def check_integers(name: str, values: object, minimum: int, maximum: int | None = None) -> list[int]:
    """Return one integer or several (a list, an array, an iterator) as a list, after checking each of them.

    Raises:
        InputError: A value is below `minimum` or above `maximum`.
        InputTypeError: A value is not an integer.
    """
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return [check_integer(name, values, minimum, maximum)]
    if isinstance(values, str | bytes):
        raise InputTypeError(f"{name} ({values!r}) must be integers")
    return [check_integer(name, value, minimum, maximum) for value in values]


def check_size(name: str, value: object, minimum: int) -> int:
    """Return a size of a model, after checking that it is an integer from `minimum` to `LARGEST`.

    Raises:
        InputError: The value is below `minimum` or above `LARGEST`.
        InputTypeError: The value is not an integer.
    """
    integer = check_integer(name, value, minimum)
    if integer > LARGEST:
        raise InputError(f"{name} ({integer}) must be at most {LARGEST}")
    return integer


def check_number(
    name: str,
    value: object,
    *,
    minimum: float | int | None = None,
    above: float | int | None = None,
    maximum: float | int | None = None,
    below: float | int | None = None,
) -> float | int:
    """Return a number, after checking that it is within bounds; without an upper bound it must be finite.

    Args:
        name: The value's name in the error message.
        value: The value.
        minimum: Smallest valid number.
        above: Bound that the number must exceed.
        maximum: Largest valid number.
        below: Bound that the number must stay below.

    Raises:
        InputError: The value is out of bounds, infinite or NaN.
        InputTypeError: The value is not a number.
    """
    number = to_number(value)
    if number is None:
        raise InputTypeError(f"{name} ({shown(value)}) must be a number")
    is_high_enough = (minimum is None or number >= minimum) and (above is None or number > above)
    is_low_enough = (maximum is None or number <= maximum) and (below is None or number < below)
    if is_high_enough and is_low_enough and math.isfinite(number):
        return number
    if minimum is not None and maximum is not None:
        raise InputError(f"{name} ({number}) must be from {minimum} to {maximum}")
    rules = [f"at least {minimum}"] if minimum is not None else [f"above {above}"] if above is not None else []
    rules += [f"at most {maximum}"] if maximum is not None else [f"below {below}"] if below is not None else ["finite"]
    raise InputError(f"{name} ({number}) must be {' and '.join(rules)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a value is one of several words.

    Raises:
        InputError: The value is none of them.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} ({shown(value)}) must be one of {', '.join(choices)}")


def check_flag(name: str, value: object) -> bool:
    """Return a truth value as a bool.

    Raises:
        InputTypeError: The value is neither true nor false.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputTypeError(f"{name} ({shown(value)}) must be true or false")
    return bool(value)


def check_seed(name: str, seed: object) -> int:
    """Return a seed as an int, after checking that every random generator accepts it.

    Raises:
        InputError: The seed is negative or does not fit into 63 bits.
        InputTypeError: The seed is not an integer.
    """
    integer = to_integer(seed)
    if integer is not None and not 0 <= integer < 2**63:
        raise InputError(f"{name} ({integer}) must be from 0 to 2**63 - 1")
    return check_integer(name, seed, 0)


_MOST_THREADS = 1 << 16


def check_threads(threads: object) -> int | None:
    """Return a number of CPU threads, after checking it; None leaves the choice to torch.

    Raises:
        InputError: The number is below 1 or above 65536.
        InputTypeError: It is not an integer.
    """
    return None if threads is None else check_integer("threads", threads, 1, _MOST_THREADS)
