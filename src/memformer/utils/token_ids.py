"""Token ids that a user gives: a list, an array or a tensor."""

from collections.abc import Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memformer.errors import InputError, InputTypeError
from memformer.utils.checks import shown
from memformer.utils.words import with_article

TokenRow = Sequence[int] | NDArray[np.integer] | Tensor


def has_length(value: object) -> bool:
    """Whether a value holds several items and is no text; tensors and arrays without a dimension hold one."""
    return hasattr(value, "__len__") and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def check_token_ids(token_ids: object, *, vocab_size: int) -> NDArray[np.integer]:
    """Return the token ids of one row as an array.

    Raises:
        InputError: A token id is outside the vocabulary or masked, or the ids are not one-dimensional.
        InputTypeError: The token ids are not integers.
    """
    if isinstance(token_ids, str | bytes | Mapping | Set) or not hasattr(token_ids, "__len__"):
        raise InputTypeError(
            f"token ids are {with_article(type(token_ids).__name__)}; they must be a list, array or tensor"
        )
    if isinstance(token_ids, Tensor):
        if token_ids.is_floating_point() or token_ids.is_complex():  # NumPy lacks some of these dtypes
            dtype = str(token_ids.dtype).removeprefix("torch.")
            raise InputTypeError(f"token ids have dtype {dtype}; they must be integers")
        token_ids = token_ids.cpu()
    if np.ma.is_masked(token_ids):
        raise InputError("token ids are an array with masked items; give the ids alone (compressed())")
    try:
        ids = np.asarray(token_ids)
    except ValueError as error:  # a list in which some items are lists
        raise InputError(f"token ids ({shown(token_ids)}) must be one-dimensional") from error
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.dtype.kind not in "iu":
        raise InputTypeError(f"token ids have dtype {ids.dtype}; they must be integers")
    if ids.ndim != 1:
        raise InputError(f"token ids have shape {ids.shape}; a row's ids must be one-dimensional")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary; valid ids are 0 to {vocab_size - 1}")
    return ids
