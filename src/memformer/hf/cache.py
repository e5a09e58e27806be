"""The state of a stream of tokens as a cache of transformers; its size does not depend on the number of tokens."""

import zlib
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.hf.rows import TokenRows
from memformer.utils.words import with_article


class MemformerCache(Cache):
    """A session, as `generate` and `forward` carry it from call to call.

    A call of the model passes only the tokens that are new. `generate` is given all tokens since the cache was new, as
    for other models, wherever padding stands in them: `model.generate(sequences, cache=cache)`. Those that the cache
    has read are skipped; a checksum tells whether they are the same. An attention mask with a column for those before,
    too, says that the tokens are new ones only. Tokens that the session read before the cache was made do not count.

    Args:
        session: The session; a new one, or one from `Session.load`.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session
        self._num_columns = max(session.num_tokens)
        self._read_before = list(session.num_tokens)
        # The number and the checksum of the tokens that each row has read since.
        self._read = [(0, 0)] * session.batch_size

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
        self._read = _add_tokens(self._read, rows.tokens, rows.counts.tolist())

    @property
    def knows_its_tokens(self) -> bool:
        """Whether the session has read only tokens of the cache since the cache was made."""
        counts = zip(self._read_before, self.num_read, strict=True)
        return [before + count for before, count in counts] == list(self.session.num_tokens)

    @property
    def num_read(self) -> list[int]:
        """Number of tokens that each row has read since the cache was made."""
        return [count for count, _ in self._read]

    def check_begin(self, rows: TokenRows) -> None:
        """Check that each row begins with the tokens that the cache has read in it.

        Raises:
            InputError: One of them does not, or there are more or fewer rows.
        """
        check_rows(self, batch_size=len(rows.counts))
        if not self.knows_its_tokens:
            raise InputError(
                "the session of the cache was fed by other means than the cache, so the tokens that it has read are "
                f"not known; pass new tokens with an attention_mask that has {self._num_columns} columns more "
                "(cache.get_seq_length())"
            )
        begins = _add_tokens([(0, 0)] * self.batch_size, rows.tokens, self.num_read)
        for row, (read, begin, count) in enumerate(zip(self._read, begins, rows.counts.tolist(), strict=True)):
            if count < read[0] or begin != read:
                raise InputError(
                    f"row {row} of input_ids does not begin with the {read[0]} tokens that the cache has read; pass "
                    "all tokens since the cache was new, or new ones with an attention_mask that has "
                    f"{self._num_columns} columns more (cache.get_seq_length())"
                )

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
        self._read_before = [0] * session.batch_size
        self._read = [(0, 0)] * session.batch_size

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
        self._read_before = [self._read_before[row] for row in rows]
        self._read = [self._read[row] for row in rows]


def _add_tokens(read: list[tuple[int, int]], tokens: Tensor, counts: list[int]) -> list[tuple[int, int]]:
    """Return the numbers and checksums of tokens after the first `counts` tokens of each row were read as well."""
    return [
        (before + count, zlib.crc32(row[:count].tobytes(), checksum))
        for (before, checksum), row, count in zip(read, tokens.cpu().numpy(), counts, strict=True)
    ]


def check_cache(cache: Any, *, session_model: object, batch_size: int) -> None:
    """Check that a cache belongs to a model and has as many rows as the input.

    Raises:
        InputError: It is of another kind, of another model, or has another number of rows.
    """
    if not isinstance(cache, MemformerCache):
        raise InputError(
            f"cache is {with_article(type(cache).__name__)}; this model continues from a MemformerCache only"
        )
    if cache.session.model is not session_model:
        raise InputError("cache is of another model; its memory means nothing to this one")
    check_rows(cache, batch_size=batch_size)


def check_rows(cache: MemformerCache, *, batch_size: int) -> None:
    """Check that a cache has as many rows as the input.

    Raises:
        InputError: It has more or fewer.
    """
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
