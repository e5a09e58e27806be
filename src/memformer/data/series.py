"""Series of measured values: columns of CSV files and of NumPy arrays."""

import csv
import io
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.content import open_source, open_text
from memformer.data.documents import Document, parse_slice
from memformer.data.files import SourceFile
from memformer.errors import InputError

Values = NDArray[np.float64]

_NUMPY_HEAD = b"\x93NUMPY"


def read_series(
    files: Iterable[SourceFile], *, columns: Sequence[str] | None = None, rows: str | None = None
) -> Iterator[Document]:
    """Yield every file as one document, whose content has the shape (rows, columns).

    A file is a NumPy array (.npy) of one or two dimensions, or text with one row in each line, separated by commas; the
    first line may hold the names of the columns, none of which is a number unless `columns` names it. Without names,
    columns are called 0, 1, 2, ...

    Args:
        files: The files.
        columns: Names of the columns to read, in this order. None: all.
        rows: A `start:stop` slice of the rows of each file. None: all.

    Raises:
        InputError: A file cannot be read, has no such column or no row, or a value is no finite number.
    """
    for path, _ in files:
        names, values = _read_numpy(path) if _is_numpy(path) else _read_csv(path, columns)
        start = 0
        if rows is not None:
            chosen = range(len(values))[slice(*parse_slice(rows, name="rows"))]
            start = chosen.start
            values = values[chosen.start : chosen.stop]
        if not values.size:
            raise InputError(f"{path} has no values to read" + ("" if rows is None else f" in rows {rows}"))
        values = _select(path, names, values, columns)
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            row, column = (int(index) for index in wrong[0])
            name = (names if columns is None else columns)[column]
            raise InputError(
                f"{path}, row {start + row} (counted from 0), column {name!r} is {values[row, column]}; a series needs "
                "finite numbers: fill missing values in, or leave their rows out"
            )
        yield Document(str(path), values)


def series_columns(files: Sequence[SourceFile], columns: Sequence[str] | None) -> list[str]:
    """Return the names of the columns of a source: those given, or all of its first file.

    Raises:
        InputError: The file cannot be read, has no values, or has a column without a name of its own.
    """
    if columns is not None:
        return list(columns)
    path = files[0].path
    if _is_numpy(path):
        names = _read_numpy(path)[0]
    else:
        with _csv_rows(path) as reader:
            first: list[str] = next(filter(None, reader), [])
            names = _checked_names(path, first) or _numbered(first)
    if not names:
        raise InputError(f"{path} has no values to read")
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two columns of the same name: {', '.join(names)}")
    return names


def parse_row(fields: Sequence[str], *, where: str) -> list[float]:
    """Return the fields of a line as numbers.

    Raises:
        InputError: A field is not a finite number.
    """
    numbers = []
    for field in fields:
        number = number_of(field)
        if number is None or not np.isfinite(number):
            raise InputError(f"{where} has {field!r}, which is not a finite number")
        numbers.append(number)
    return numbers


def number_of(field: str) -> float | None:
    """Return a field as a number; None if it is none. An empty field is a missing value, NaN."""
    text = field.strip()
    if not text:
        return float("nan")
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def is_header(fields: Sequence[str], *, columns: Sequence[str] | None = None) -> bool:
    """Return whether the fields of a first line are names.

    They are if none of them is a number; and if they hold the names of all `columns`, which cannot be meant by their
    place.

    Raises:
        InputError: Some field is no number, and the columns may be meant by name or by place.
    """
    words = [field for field in fields if field.strip() and number_of(field) is None]
    if words and all(not field.strip() or number_of(field) is None for field in fields):
        return True
    if columns is None or not set(columns) <= {field.strip() for field in fields}:
        return False
    if set(columns) <= set(_numbered(fields)):
        if not words:
            return False
        raise InputError(
            f"the first line {','.join(fields)!r} has the columns {', '.join(columns)} as names or as values: name "
            "them so that none is a number, or choose others"
        )
    return True


def _is_numpy(path: Path) -> bool:
    with open_source(path) as stream:
        return stream.peek(len(_NUMPY_HEAD)).startswith(_NUMPY_HEAD)


def _read_numpy(path: Path) -> tuple[list[str], Values]:
    with open_source(path) as stream:
        content = io.BytesIO(stream.read())
    try:
        loaded = np.load(content, allow_pickle=False)
        if content.read(1):
            raise ValueError(f"it has data after the array, of shape {loaded.shape}")
    except (ValueError, EOFError, OSError, SyntaxError, TokenError, MemoryError) as error:  # in a damaged header
        raise InputError(f"{path} is not a NumPy array of numbers: {error}") from error
    if loaded.dtype.kind not in "iufb" or loaded.ndim not in {1, 2}:
        raise InputError(
            f"{path} has shape {loaded.shape} and dtype {loaded.dtype}; a series needs numbers of shape (rows,) or "
            "(rows, columns)"
        )
    with np.errstate(over="ignore"):  # a number that float64 cannot hold becomes infinite, and is refused as that
        values = np.asarray(loaded, np.float64)
    values = values.reshape(len(loaded), 1 if loaded.ndim == 1 else loaded.shape[1])
    return [str(index) for index in range(values.shape[1])], values


def _read_csv(path: Path, columns: Sequence[str] | None) -> tuple[list[str], Values]:
    """Return the names of the columns, and their values; a column that is not read is NaN.

    Raises:
        InputError: The file is not CSV, a value is not a number, or two columns that are read have the same name.
    """
    names: list[str] = []
    found = array("d")  # a list of rows would take ten times the memory
    read: list[int] = []
    with _csv_rows(path) as reader:
        for fields in reader:
            if not fields:
                continue
            if not names:
                header = _checked_names(path, fields, columns)
                names = header or _numbered(fields)
                read = [index for index, name in enumerate(names) if columns is None or name in columns]
                if header:
                    continue
            found.extend(_row(path, reader.line_num, fields, names, read))
    if len({names[index] for index in read}) < len(read):
        raise InputError(f"{path} has two columns of the same name: {', '.join(names)}")
    return names, np.array(found, np.float64).reshape(-1, max(len(names), 1))


@contextmanager
def _csv_rows(path: Path) -> Iterator[Any]:
    with open_text(path) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        try:
            yield reader
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _checked_names(path: Path, fields: list[str], columns: Sequence[str] | None = None) -> list[str]:
    """Return the names of the columns in the first line; none if it holds values.

    Raises:
        InputError: The line may hold names or values, or a column has no name and all are to be read.
    """
    try:
        names = [field.strip() for field in fields] if is_header(fields, columns=columns) else []
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    separator = next((mark for mark in (";", "\t") if any(mark in field for field in fields)), None)
    if separator is not None:
        raise InputError(
            f"{path}: the first line {','.join(fields)!r} has {separator!r} in it; the fields of a line must be "
            "separated by commas, and the decimal point must be a point"
        )
    if "" in names and columns is None:
        raise InputError(
            f"{path}: the first line {','.join(fields)!r} has a column without a name (as an index that pandas wrote); "
            "choose the columns to read with columns"
        )
    return names


def _numbered(fields: Sequence[str]) -> list[str]:
    return [str(index) for index in range(len(fields))]


def _row(path: Path, line: int, fields: list[str], names: list[str], read: list[int]) -> list[float]:
    if len(fields) != len(names):
        raise InputError(f"{path}, line {line} has {len(fields)} fields; the first line has {len(names)}")
    row = [float("nan")] * len(names)
    for index in read:
        number = number_of(fields[index])
        if number is None:
            raise InputError(
                f"{path}, line {line}, column {names[index]!r} is {fields[index]!r}, which is not a number; "
                "choose the columns to read with columns"
            )
        row[index] = number
    return row


def _select(path: Path, names: list[str], values: Values, columns: Sequence[str] | None) -> Values:
    if columns is None:
        return values
    missing = [name for name in columns if name not in names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(names)}")
    return values[:, [names.index(name) for name in columns]]
