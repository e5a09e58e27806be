"""The state of a stream of tokens as a cache of transformers; its size does not depend on the number of tokens."""

import zlib
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.hf.rows import TokenRows


class MemformerCache(Cache):
    """A session, as `generate` and `forward` carry it from call to call.

    A call passes only the tokens that are new. `generate` does not read the token that it returns last, so the next
    call begins with it: `model.generate(sequences[:, -1:], cache=cache)`. It may also be given all tokens since the
    cache was new, as for other models, wherever padding stands in them; those that were read before are recognized by
    a checksum.

    Args:
        session: The session; a new one, or one from `Session.load`.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session
        self._num_columns = max(session.num_tokens)
        # The checksum of each row's tokens. None: the session has read tokens that are not known here.
        self._checksums = None if self._num_columns else [0] * session.batch_size

    def __len__(self) -> int:
        return 1  # An empty cache would count as no cache.

    def __repr__(self) -> str:
        return f"MemformerCache({self.session.batch_size} rows, {self._num_columns} columns)"

    @property
    def is_linear(self) -> list[bool]:
        """True for the one layer: a call passes new tokens only."""
        return [True]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.session.batch_size

    def advance(self, rows: TokenRows) -> None:
        """Count the columns, padding included, of the tokens that the session was fed."""
        self._num_columns += rows.tokens.shape[1]
        if self._checksums is not None:
            self._checksums = _checksums(rows.tokens, rows.counts.tolist(), after=self._checksums)

    def is_continued_by(self, rows: TokenRows) -> bool:
        """Return whether each row begins with exactly the tokens that the cache has read in it."""
        num_read = self.session.num_tokens
        is_known = self._checksums is not None and len(rows.counts) == self.batch_size
        if not is_known or any(read > count for read, count in zip(num_read, rows.counts.tolist(), strict=True)):
            return False
        return self._checksums == _checksums(rows.tokens, num_read, after=[0] * self.batch_size)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, padding included."""
        return self._num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Start all rows anew."""
        session = self.session
        self.session = Session(
            session.model,
            batch_size=session.batch_size,
            compiled=session.compiled,
            stop_token_ids=session.stop_token_ids,
        )
        self._num_columns = 0
        self._checksums = [0] * session.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens.

        Raises:
            InputError: There are tokens to remove.
        """
        if tokens_to_remove:
            raise InputError(
                f"{abs(tokens_to_remove)} tokens cannot be removed: a memory cannot forget its last tokens"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by these rows."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row can be kept several times."""
        rows = torch.arange(self.batch_size)[indices.cpu()]  # The indices may also be a mask.
        self._select_rows(rows.tolist())

    def _select_rows(self, rows: list[int]) -> None:
        self.session.select_rows(rows)
        if self._checksums is not None:
            self._checksums = [self._checksums[row] for row in rows]


def _checksums(tokens: Tensor, counts: list[int], *, after: list[int]) -> list[int]:
    """Return the checksum of each row's first tokens, which follow those of other checksums."""
    return [
        zlib.crc32(row[:count].tobytes(), checksum)
        for row, count, checksum in zip(tokens.cpu().numpy(), counts, after, strict=True)
    ]


def check_cache(cache: Any, *, session_model: object, batch_size: int) -> None:
    """Check that a cache belongs to a model and has as many rows as the input.

    Raises:
        InputError: It is of another kind, of another model, or has another number of rows.
    """
    if not isinstance(cache, MemformerCache):
        raise InputError(f"cache is a {type(cache).__name__}; this model continues from a MemformerCache only")
    if cache.session.model is not session_model:
        raise InputError("cache is of another model; its memory means nothing to this one")
    if cache.batch_size != batch_size:
        raise InputError(f"cache has {cache.batch_size} rows, but input_ids have {batch_size}")


def check_cache_use(cache: object, use_cache: bool | None) -> None:
    """Check that a cache is not given where none shall be used: it could neither be read nor left as it is.

    Raises:
        InputError: `use_cache` is false, and there is a cache.
    """
    if cache is not None and use_cache is False:
        raise InputError(
            "use_cache is False, but a cache is given; it would be changed in place: pass a copy "
            "(copy.deepcopy) and leave use_cache out, or pass no cache"
        )
