"""Warns of values of a series that lie outside of its training data, which bins cannot tell from the outermost ones."""

from dataclasses import replace

import numpy as np

from memformer.data import BinTokenizer, SourceConfig, Tokenizer
from memformer.data.sources import iterate_documents
from memformer.utils.progress import print_warning

# A few new extremes are normal in the documents of an evaluation.
_MOST_OF_DOCUMENTS = 0.01


class OutsideValues:
    """Finds the values of a text outside of the ranges of the training data, and warns once for each column.

    Args:
        tokenizer: The tokenizer of the run. Only bins have ranges.
        name: Name of the text in messages.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._bins = tokenizer if isinstance(tokenizer, BinTokenizer) and tokenizer.ranges is not None else None
        self._name = name
        self._known: set[int] = set()

    def add(self, content: bytes) -> None:
        """Look at the next lines of the text."""
        if self._bins is None or len(self._known) == len(self._bins.columns):
            return
        for index in np.flatnonzero(self._bins.count_outside(content, self._name)).tolist():
            if index not in self._known:
                self._known.add(index)
                print_warning(f"{self._name} has {_outside(self._bins, index)}")


def warn_of_outside_values(tokenizer: Tokenizer, source: SourceConfig, *, name: str) -> None:
    """Print a warning for each column of a series that has more than a few values outside of the training data.

    Args:
        tokenizer: The tokenizer of the run.
        source: The series to look at.
        name: Its name in messages.

    Raises:
        InputError: The series cannot be read.
    """
    if not isinstance(tokenizer, BinTokenizer) or tokenizer.ranges is None:
        return
    num_rows, counts = 0, np.zeros(len(tokenizer.columns), np.int64)
    for document in iterate_documents(replace(source, columns=tokenizer.columns)):
        num_rows += len(document.content)
        counts += tokenizer.count_outside(document.content, document.name)
    for index in np.flatnonzero(counts > _MOST_OF_DOCUMENTS * num_rows).tolist():
        print_warning(f"{name} has {_outside(tokenizer, index)}: {counts[index] / num_rows:.0%} of its rows")


def _outside(tokenizer: BinTokenizer, index: int) -> str:
    assert tokenizer.ranges is not None
    lowest, highest = tokenizer.ranges[index]
    return (
        f"values of column {tokenizer.columns[index]!r} outside of those of the training data ({lowest:g} to "
        f"{highest:g}), which are read as the outermost bins"
    )
