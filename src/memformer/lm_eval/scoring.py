"""Scores of token ids that sessions read, in pieces: memory does not depend on the number of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memformer.generation.session import Session
from memformer.utils.checks import check_likelihood

Ids = NDArray[np.integer[Any]]

# Tokens of a row whose likelihoods are held at once, and logits of a row.
_PIECE_TOKENS = 1 << 14
_PIECE_LOGITS = 1 << 22


def nats_of(session: Session, rows: Sequence[Ids]) -> list[float]:
    """Read the rows; return the log-likelihood of each in nats, summed in float64.

    Raises:
        InputError: As `Session.score`.
    """
    totals = [0.0] * len(rows)
    for pieces in _in_pieces(rows, _whole_segments(session, _PIECE_TOKENS)):
        for row, nll in enumerate(_as_rows(session.score(pieces))):
            totals[row] -= float(nll.double().sum())
    return totals


def nats_and_greedy(session: Session, rows: Sequence[Ids]) -> list[tuple[float, bool]]:
    """Read the rows; return of each the log-likelihood in nats, and whether greedy decoding would generate it.

    Raises:
        InputError: As `Session.token_logits`, or a log-likelihood is not finite, because the model's weights are
            broken.
    """
    totals, is_greedy = [0.0] * len(rows), [True] * len(rows)
    num_tokens = _whole_segments(session, _PIECE_LOGITS // session.model.vocab_size)
    for pieces in _in_pieces(rows, num_tokens):
        for row, logits in enumerate(_as_rows(session.token_logits(pieces))):
            ids = torch.from_numpy(pieces[row].astype(np.int64))
            totals[row] += float(logits.double().log_softmax(-1).gather(-1, ids[:, None]).sum())
            is_greedy[row] &= bool((logits.argmax(-1) == ids).all())
    check_likelihood(totals)
    return list(zip(totals, is_greedy, strict=True))


def _whole_segments(session: Session, num_tokens: int) -> int:
    length = session.model.segment_length
    return max(num_tokens // length, 1) * length


def _in_pieces(rows: Sequence[Ids], num_tokens: int) -> Iterator[list[Ids]]:
    for start in range(0, max(map(len, rows)), num_tokens):
        yield [row[start : start + num_tokens] for row in rows]


def _as_rows(values: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else values
