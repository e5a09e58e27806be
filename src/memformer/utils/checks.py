"""Checks of values that people give: one wording for each rule."""

import difflib
from collections.abc import Iterable

from memformer.errors import InputError, InputTypeError

# Far beyond any use; what is larger is a slip or damage, and the product of two still fits an integer.
LARGEST = 1 << 24


def refuse_unknown_keys(given: Iterable[str], *, valid: Iterable[str], owner: str) -> None:
    """Check that every given key is a valid one.

    Raises:
        InputError: A key is unknown; the message names the nearest valid one.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid)}"
            raise InputError(f"unknown key {key!r} in {owner}; {hint}")


def check_integer(name: str, value: object, minimum: int) -> None:
    """Check a field of a config.

    Raises:
        InputError: It is below `minimum`, or beyond any use.
        InputTypeError: It is not an integer.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"{name} ({value!r}) must be an integer")
    if value < minimum:
        raise InputError(f"{name} ({value}) must be at least {minimum}")
    if value > LARGEST:
        raise InputError(f"{name} ({value}) must be at most {LARGEST}")


def check_seed(name: str, seed: int) -> None:
    """Check that a seed is one that every random generator takes.

    Raises:
        InputError: It is negative or does not fit 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"{name} ({seed}) must be from 0 to 2**63 - 1")


def check_number(name: str, value: object) -> None:
    """Check a field of a config.

    Raises:
        InputTypeError: It is not a number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputTypeError(f"{name} ({value!r}) must be a number")


_MOST_THREADS = 1 << 16


def check_threads(threads: int | None) -> None:
    """Check that a number of threads is one that torch takes.

    Raises:
        InputError: It is below 1, or absurd.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(f"threads ({threads}) must be from 1 to {_MOST_THREADS}")
