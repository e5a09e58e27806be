"""Checks of the token ids that a session is given."""

from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.errors import InputError, InputTypeError
from memformer.utils.token_ids import check_token_ids, has_length
from memformer.utils.words import with_article

TokenIds = (
    Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[NDArray[np.integer]]
    | Sequence[Tensor]
    | NDArray[np.integer]
    | Tensor
)

# Tokens of a row that are converted at once.
_CHUNK_TOKENS = 1 << 20


def check_token_rows(token_ids: TokenIds, *, batch_size: int, vocab_size: int) -> list[NDArray[np.integer]]:
    """Return the token ids of each row of a session.

    Args:
        token_ids: Token ids of one stream, or a list with the token ids of each row; rows may differ in length.
        batch_size: Number of rows.
        vocab_size: Number of token ids V.

    Raises:
        InputError: A token id is outside the vocabulary, or the number of rows is not `batch_size`.
        InputTypeError: The token ids are not integers.
    """
    return [check_token_ids(row, vocab_size=vocab_size) for row in _split(token_ids, batch_size)]


def in_chunks(rows: list[NDArray[np.integer]]) -> Iterator[list[Tensor]]:
    """Yield the rows in parts as int64 tensors on the CPU, so that a long input is never converted as a whole."""
    for start in range(0, max(len(row) for row in rows), _CHUNK_TOKENS):
        yield [torch.from_numpy(row[start : start + _CHUNK_TOKENS].astype(np.int64)) for row in rows]


def _split(token_ids: TokenIds, batch_size: int) -> list[object]:
    if isinstance(token_ids, Mapping | Set) or not has_length(token_ids):
        raise InputTypeError(
            f"token ids are {with_article(type(token_ids).__name__)}; they must be a list, array or tensor"
        )
    if batch_size == 1:
        nested = token_ids.ndim == 2 if isinstance(token_ids, Tensor | np.ndarray) else _is_nested(token_ids)
        if not nested:
            return [token_ids]
    rows = list(token_ids)
    if len(rows) != batch_size or (batch_size > 1 and not all(has_length(row) for row in rows)):
        raise InputError(
            f"a session of {batch_size} rows was fed {len(rows)} items; it needs a list with the token ids of each row"
        )
    return list(rows)


def _is_nested(token_ids: Sequence[object]) -> bool:
    return len(token_ids) > 0 and has_length(next(iter(token_ids)))
