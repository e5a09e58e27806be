"""A tokenizer of measured values: every column is quantized into bins that are fitted on the training data."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memformer.data.documents import Document
from memformer.data.series import is_header, number_of, parse_row
from memformer.data.tokenizers import check_token_id, fingerprint_of, smallest_dtype
from memformer.errors import InputError
from memformer.utils.checks import Integer, check_choice, check_integer

Spacing = Literal["quantile", "uniform"]


class BinTokenizer:
    """A tokenizer whose token ids are bins of values; the columns of a row follow each other in a fixed order.

    Every column has its own bins and its own token ids. A value below the first edge or above the last belongs to the
    outer bin. As text, a row is one line of numbers separated by commas; a bin is written as its centre.

    Args:
        columns: Names of the columns.
        edges: For each column, the increasing edges between its bins; a value at an edge is in the upper bin.
        centres: For each column, one value in each of its bins, as which the bin is decoded.
        ranges: For each column, the smallest and the largest training value. None: unknown, as in runs of earlier
            versions.

    Raises:
        InputError: There is no column, or edges, centres and range of a column do not fit each other.
    """

    kind = "bins"

    def __init__(
        self,
        columns: Sequence[str],
        edges: Sequence[Sequence[float]],
        centres: Sequence[Sequence[float]],
        ranges: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.columns = [str(name) for name in columns]
        self.edges = [np.array(column, np.float64).reshape(-1) for column in edges]
        self.centres = [np.array(column, np.float64).reshape(-1) for column in centres]
        if not self.columns or not len(self.columns) == len(self.edges) == len(self.centres):
            raise InputError(f"bins need edges and centres for each of the {len(self.columns)} columns")
        for name, own_edges, own_centres in zip(self.columns, self.edges, self.centres, strict=True):
            if (
                not np.isfinite(own_edges).all()
                or not (np.diff(own_edges) > 0).all()
                or np.searchsorted(own_edges, own_centres, side="right").tolist() != [*range(len(own_edges) + 1)]
            ):
                raise InputError(f"the bins of column {name!r} need increasing edges, and one centre in each bin")
        self.ranges = None if ranges is None else np.array(ranges, np.float64)
        if self.ranges is not None and (
            self.ranges.shape != (len(self.columns), 2) or not (self.ranges[:, 0] <= self.ranges[:, 1]).all()
        ):
            raise InputError(f"the bins need the smallest and the largest value of each of the {len(columns)} columns")
        counts = [len(column) for column in self.centres]
        self.vocab_size = sum(counts)
        self._first = np.cumsum([0, *counts])  # token id of each column's first bin
        self._texts = [_shortest(own, float(value)) for own, values in zip(self.edges, self.centres, strict=True)
                       for value in values]  # fmt: skip

    @property
    def definition(self) -> dict[str, Any]:
        """Columns, edges, centres and ranges as JSON values."""
        return {
            "columns": self.columns,
            "edges": [own.tolist() for own in self.edges],
            "centres": [own.tolist() for own in self.centres],
            **({} if self.ranges is None else {"ranges": self.ranges.tolist()}),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_of({"kind": self.kind, **self.definition})

    def encode(self, content: bytes | NDArray[Any], name: str) -> NDArray[np.integer[Any]]:
        """Return the token ids of a series: an array of shape (rows, columns), or lines of text.

        Lines of text hold one number for each column, separated by commas; a line with the names of the columns and
        blank lines have no tokens.

        Raises:
            InputError: A row has another number of columns, or a value is not a finite number.
        """
        values = self._values(content, name)
        ids = np.empty(values.shape, smallest_dtype(self.vocab_size))
        for index, own_edges in enumerate(self.edges):
            ids[:, index] = np.searchsorted(own_edges, values[:, index], side="right") + self._first[index]
        return ids.reshape(-1)

    def next_ids(self, num_tokens: int) -> range:
        """Return the token ids of the column that follows after a number of tokens, counted from the start of a row."""
        column = num_tokens % len(self.columns)
        return range(self._first[column], self._first[column + 1])

    def count_outside(self, content: bytes | NDArray[Any], name: str) -> NDArray[np.int64]:
        """Return how many values of each column of a series lie outside of its range; 0 if the ranges are unknown.

        Raises:
            InputError: As `encode`.
        """
        values = self._values(content, name)
        if self.ranges is None:
            return np.zeros(len(self.columns), np.int64)
        return ((values < self.ranges[:, 0]) | (values > self.ranges[:, 1])).sum(axis=0)

    def _values(self, content: bytes | NDArray[Any], name: str) -> NDArray[np.float64]:
        values = self._parse(content, name) if isinstance(content, bytes) else np.asarray(content, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.columns):
            raise InputError(f"document {name} has shape {values.shape}; it must be (rows, {len(self.columns)})")
        if not np.isfinite(values).all():
            raise InputError(f"document {name} has values that are not finite")
        return values

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the centres of the bins as lines of text.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return "".join(self.decode_stream(ids)).encode()

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the centre of each bin, followed by a comma, or by a line end in the last column.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        for token in ids:
            text = self._texts[check_token_id(token, self.vocab_size)]
            yield text + ("\n" if token >= self._first[-2] else ",")

    def _parse(self, content: bytes, name: str) -> NDArray[np.float64]:
        rows = []
        for line in content.decode("utf-8", "replace").split("\n"):
            line = line.removesuffix("\r")
            if not line:
                continue
            where = f"{name}: the line {line[:80]!r}"
            if "\r" in line:
                raise InputError(f"{where} has a carriage return in it; lines must end with a line feed")
            try:
                fields = [field.strip() for field in next(csv.reader([line]), [])]
            except csv.Error as error:
                raise InputError(f"{where} is not CSV: {error}") from error
            if fields == self.columns and _has_word(fields):
                continue
            if is_header(fields):
                raise InputError(f"{where} has no numbers; the rows must have {', '.join(self.columns)}, in this order")
            if len(fields) != len(self.columns):
                raise InputError(
                    f"{where} has {len(fields)} fields; a row has one number for each of the columns "
                    f"{', '.join(self.columns)}"
                )
            rows.append(parse_row(fields, where=where))
        return np.array(rows, np.float64).reshape(-1, len(self.columns))


def fit_bins(
    documents: Iterable[Document], *, columns: Sequence[str], num_bins: Integer, spacing: Spacing
) -> BinTokenizer:
    """Return bins fitted on the values of the training documents.

    Args:
        documents: The training documents, of shape (rows, columns) each. Their values are held in memory.
        columns: Names of the columns.
        num_bins: Largest number of bins of a column; it gets fewer if it has fewer different values, or very common
            ones.
        spacing: quantile: every bin holds about as many training values, and its centre is their mean; a value that is
            more common than that has a bin of its own (the most common ones, if there are too few bins), and so has
            each value if there are at most `num_bins`. uniform: all bins between the smallest and the largest training
            value are equally wide, and its centre is in the middle; a column of values that differ by rounding has one.

    Raises:
        InputError: An argument is out of range, or a document is not a series of these columns.
    """
    num_bins = check_integer("num_bins", num_bins, 2)
    check_choice("spacing", spacing, ("quantile", "uniform"))
    values = np.concatenate([np.empty((0, len(columns))), *(_checked(each, len(columns)) for each in documents)])
    if not len(values):
        raise InputError("the documents have no rows; bins are fitted on values")
    fitted = [(_quantile_bins if spacing == "quantile" else _uniform_bins)(column, num_bins) for column in values.T]
    ranges = np.stack([values.min(axis=0), values.max(axis=0)], axis=1)
    return BinTokenizer(columns, [edges for edges, _ in fitted], [centres for _, centres in fitted], ranges.tolist())


def _has_word(fields: Sequence[str]) -> bool:
    """Return whether some field is no number, so that the fields can be names of columns."""
    return any(field and number_of(field) is None for field in fields)


def _checked(document: Document, num_columns: int) -> NDArray[np.float64]:
    content = document.content
    if isinstance(content, bytes) or content.ndim != 2 or content.shape[1] != num_columns:
        raise InputError(f"document {document.name} is not a series of {num_columns} columns")
    if content.dtype.kind not in "iufb" or not np.isfinite(content).all():
        raise InputError(f"document {document.name} has a value that is not a finite number")
    return np.asarray(content, np.float64)


def _quantile_bins(values: NDArray[np.float64], num_bins: int) -> tuple[list[float], list[float]]:
    # Edges are values of the data, so that no bin is empty.
    edges = _quantile_edges(values, num_bins)
    bins = np.searchsorted(edges, values, side="right")
    counts = np.bincount(bins, minlength=len(edges) + 1)
    means = np.bincount(bins, weights=values, minlength=len(edges) + 1) / counts
    # The mean of equal values may be rounded out of their bin.
    ordered, ends = np.sort(values), counts.cumsum()
    return edges.tolist(), np.clip(means, ordered[ends - counts], ordered[ends - 1]).tolist()


def _quantile_edges(values: NDArray[np.float64], num_bins: int) -> NDArray[np.float64]:
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= num_bins:
        return distinct[1:]
    # The values that are more common than a bin of the others get their own bins, the most common ones first. The
    # others are spread over the bins that are left, of which each gap between common values needs one.
    is_common = np.zeros(len(distinct), bool)
    num_others, num_other_bins = len(values), num_bins
    for index in np.argsort(-counts, kind="stable"):
        if counts[index] * num_bins <= len(values) and counts[index] * num_other_bins <= num_others:
            break
        is_common[index] = True
        num_gaps = int((~is_common & np.append(True, is_common[:-1])).sum())
        if is_common.sum() + num_gaps > num_bins:
            is_common[index] = False
            break
        num_others -= int(counts[index])
        num_other_bins = num_bins - int(is_common.sum()) - (num_gaps - 1)
    others = np.repeat(distinct[~is_common], counts[~is_common])
    quantiles = np.quantile(others, np.arange(1, num_other_bins) / num_other_bins, method="inverted_cdf")
    edges = np.union1d(quantiles, distinct[is_common | np.append(False, is_common[:-1])])
    return edges[edges > distinct[0]]


def _uniform_bins(values: NDArray[np.float64], num_bins: int) -> tuple[list[float], list[float]]:
    lowest, highest = float(values.min()), float(values.max())
    shares = np.linspace(0, 1, num_bins + 1)
    edges = lowest * (1 - shares) + highest * shares  # the difference of the two may be too large for float64
    centres = edges[:-1] / 2 + edges[1:] / 2
    if np.searchsorted(edges[1:-1], centres, side="right").tolist() != [*range(num_bins)]:
        return [], [lowest]  # one value, or values that float64 can hardly tell apart
    return edges[1:-1].tolist(), centres.tolist()


def _shortest(edges: NDArray[np.float64], value: float) -> str:
    """Return the shortest text that is read as a value of the same bin, with four digits or more."""
    own_bin = np.searchsorted(edges, value, side="right")
    for digits in range(4, 18):
        text = f"{value:.{digits}g}"
        if np.searchsorted(edges, float(text), side="right") == own_bin:
            return text
    return json.dumps(value)
