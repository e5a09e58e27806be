"""Checks of user input, with one error message per rule."""

import difflib
import math
from collections.abc import Iterable

from memformer.errors import InputError, InputTypeError

# Larger values can only be typos or damage. The product of two values up to this limit still fits into int64.
LARGEST = 1 << 24


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


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Check that a value is an integer from `minimum` to `maximum`.

    Args:
        name: The value's name in the error message.
        value: The value.
        minimum: Smallest valid integer.
        maximum: Largest valid integer; None for no limit.

    Raises:
        InputError: The value is below `minimum` or above `maximum`.
        InputTypeError: The value is not an integer.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"{name} ({value!r}) must be an integer")
    if maximum is not None and not minimum <= value <= maximum:
        raise InputError(f"{name} ({value}) must be from {minimum} to {maximum}")
    if value < minimum:
        raise InputError(f"{name} ({value}) must be at least {minimum}")


def check_size(name: str, value: object, minimum: int) -> None:
    """Check that a size of a model is an integer from `minimum` to `LARGEST`.

    Raises:
        InputError: The value is below `minimum` or above `LARGEST`.
        InputTypeError: The value is not an integer.
    """
    check_integer(name, value, minimum)
    if isinstance(value, int) and value > LARGEST:
        raise InputError(f"{name} ({value}) must be at most {LARGEST}")


def check_number(
    name: str,
    value: object,
    *,
    minimum: float | int | None = None,
    above: float | int | None = None,
    maximum: float | int | None = None,
    below: float | int | None = None,
) -> None:
    """Check that a value is a number within bounds; without an upper bound it must be finite.

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
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputTypeError(f"{name} ({value!r}) must be a number")
    is_high_enough = (minimum is None or value >= minimum) and (above is None or value > above)
    is_low_enough = (maximum is None or value <= maximum) and (below is None or value < below)
    if is_high_enough and is_low_enough and math.isfinite(value):
        return
    if minimum is not None and maximum is not None:
        raise InputError(f"{name} ({value}) must be from {minimum} to {maximum}")
    rules = [f"at least {minimum}"] if minimum is not None else [f"above {above}"] if above is not None else []
    rules += [f"at most {maximum}"] if maximum is not None else [f"below {below}"] if below is not None else ["finite"]
    raise InputError(f"{name} ({value}) must be {' and '.join(rules)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a value is one of several words.

    Raises:
        InputError: The value is none of them.
    """
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{name} ({value!r}) must be one of {', '.join(choices)}")


def check_seed(name: str, seed: object) -> None:
    """Check that every random generator accepts a seed.

    Raises:
        InputError: The seed is negative or does not fit into 63 bits.
        InputTypeError: The seed is not an integer.
    """
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise InputError(f"{name} ({seed}) must be from 0 to 2**63 - 1")
    check_integer(name, seed, 0)


_MOST_THREADS = 1 << 16


def check_threads(threads: int | None) -> None:
    """Check a number of CPU threads; None leaves the choice to torch.

    Raises:
        InputError: The number is below 1 or above 65536.
        InputTypeError: It is not an integer.
    """
    if threads is not None:
        check_integer("threads", threads, 1, _MOST_THREADS)
