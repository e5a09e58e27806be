"""Warns if most of a text consists of words that the vocabulary of a run does not have."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data import TextTokenizer, Tokenizer
from memformer.data.document_end import plain
from memformer.data.tokenizer_pipelines import UNKNOWN_WORD
from memformer.utils.progress import print_warning


class UnknownWords:
    """Counts the tokens of a text that stand for unknown words.

    Args:
        tokenizer: The tokenizer of the run. Only one of kind `word` has unknown words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        inner = plain(tokenizer)
        self._unknown: int | None = None
        if isinstance(inner, TextTokenizer) and inner.kind == "word":
            self._unknown = inner.tokenizer.token_to_id(UNKNOWN_WORD)
        self._num_tokens = self._num_unknown = 0

    @property
    def can_occur(self) -> bool:
        """Whether the tokenizer reads any word as unknown."""
        return self._unknown is not None

    def add(self, token_ids: NDArray[np.integer[Any]]) -> None:
        """Count a part of the text."""
        if self._unknown is not None:
            self._num_tokens += token_ids.size
            self._num_unknown += int((token_ids == self._unknown).sum())

    def warn_if_most(self, name: str) -> None:
        """Print a warning if more than half of the tokens are unknown words; `name` is the text's."""
        if 2 * self._num_unknown > self._num_tokens:
            share = self._num_unknown / self._num_tokens
            print_warning(
                f"{share:.0%} of the tokens of {name} are words outside the vocabulary of the run, which are all read "
                f"as {UNKNOWN_WORD}: the results say little about this text"
            )
