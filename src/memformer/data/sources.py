"""Sources of documents: one config, and one stream of documents for every kind."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

from memformer.data.content import is_compressed
from memformer.data.documents import Document, DocumentBlocks, parse_slice, slice_documents
from memformer.data.files import SourceFile, locate_files
from memformer.data.hub import local_folder, newest_revision, read_data_set
from memformer.data.images import DIGITS_LEVELS, DIGITS_SHAPE, idx_shape, read_digits, read_idx_files
from memformer.data.series import read_series
from memformer.data.streaming import blocks_of
from memformer.data.text import (
    compile_document_start,
    locate_standard_library,
    read_json_lines,
    read_standard_library,
    read_text_blocks,
    read_text_files,
)
from memformer.errors import InputError
from memformer.utils.checks import check_integer
from memformer.utils.fields import convert_fields

AnyDocument = TypeVar("AnyDocument", Document, DocumentBlocks)

_FIELDS_OF_KIND: dict[str, frozenset[str]] = {
    "text": frozenset({"path", "document_start"}),
    "jsonl": frozenset({"path", "text_key"}),
    "idx": frozenset({"path", "levels", "downsample"}),
    "digits": frozenset(),
    "python": frozenset(),
    "array": frozenset({"path", "columns", "rows"}),
    "huggingface": frozenset({"name", "config_name", "revision", "split", "text_key", "document_start"}),
}
_FIELDS_OF_ALL = frozenset({"kind", "documents"})
_REQUIRED_OF_KIND: dict[str, tuple[str, ...]] = {
    "text": ("path",),
    "jsonl": ("path",),
    "idx": ("path",),
    "array": ("path",),
    "huggingface": ("name", "split"),
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of documents.

    Args:
        kind: Format of the source. text: every file is a document, or several with document_start. jsonl: every line is
            a document. idx: images in the format of MNIST. digits: the 8x8 digit images of scikit-learn. python: the
            modules of this Python's standard library. array: series of values, every file is one: a NumPy array (.npy)
            or CSV, with one row per timestep; needs data.tokenizer.kind bins. huggingface: a data set of the Hugging
            Face hub, streamed, or a folder of data files or from `save_to_disk`.
        path: For text, jsonl, idx and array: a file, a folder (searched recursively, files sorted by name), a glob
            pattern, or a list of these; symbolic links are followed, and every file is read once. Compressed content
            (gzip, bzip2, xz; zstd from Python 3.14 on) is decompressed while reading. Text must be UTF-8.
        text_key: For jsonl and huggingface: the key or column that contains the text.
        name: For huggingface: the name of the data set, or the folder.
        config_name: For huggingface: the configuration of the data set, if it has several.
        revision: For huggingface: the commit of the data set on the hub, 40 hexadecimal digits. null: the newest when
            the run begins; it is then part of the run's config.
        split: For huggingface: the split to read, for example train.
        document_start: For text and huggingface: a regular expression; a line (for huggingface: a record) that matches
            it as a whole begins a new document. For example, ' = [^=].* = ' matches the article titles of WikiText.
            null: every file (for huggingface: every record) is one document.
        documents: A start:stop slice of the documents in order, for example :1000 or -10000:; either side may be empty
            or negative. null: all documents.
        levels: For idx: number of grey levels (2 to 256) to which pixels are quantized.
        downsample: For idx: side of the pixel squares that are averaged into one pixel; 2 reduces 28x28 to 14x14.
        columns: For array: names of the columns to read, in this order. Columns without names are called 0, 1, 2, ...
            null: all columns.
        rows: For array: a start:stop slice of the rows of every file, for example :8000 or -2000:, so that one file can
            hold training and later test data. null: all rows.

    Raises:
        InputError: A field is out of range, a field that the kind needs is missing, or a field is set that the kind
            does not read.
    """

    kind: Literal["text", "jsonl", "idx", "digits", "python", "array", "huggingface"] = "text"
    path: str | list[str] | None = None
    text_key: str = "text"
    name: str | None = None
    config_name: str | None = None
    revision: str | None = None
    split: str | None = None
    document_start: str | None = None
    documents: str | None = None
    levels: int = 256
    downsample: int = 1
    columns: list[str] | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        convert_fields(self)
        for required in _REQUIRED_OF_KIND.get(self.kind, ()):
            if not getattr(self, required):
                raise InputError(f"{required} ({getattr(self, required)!r}) must be given for kind {self.kind!r}")
        readable = keys_of_kind(self.kind)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in readable and value != field.default:
                readers = [kind for kind, names in _FIELDS_OF_KIND.items() if field.name in names]
                raise InputError(
                    f"{field.name} ({value!r}) is not read by kind {self.kind!r}, only by {', '.join(readers)}"
                )
        if self.document_start is not None:
            compile_document_start(self.document_start)
        check_integer("levels", self.levels, 2, 256)
        check_integer("downsample", self.downsample, 1)
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise InputError(
                f"revision ({self.revision!r}) must be a commit, 40 hexadecimal digits; branches and tags can move"
            )
        for name in ("documents", "rows"):
            if (value := getattr(self, name)) is not None:
                parse_slice(value, name=name)
                object.__setattr__(self, name, value.strip())
        if self.columns is not None and (not self.columns or len(set(self.columns)) < len(self.columns)):
            raise InputError(f"columns ({self.columns}) must be at least one name, each of them once")


def keys_of_kind(kind: str) -> frozenset[str]:
    """Return the keys that a source of this kind reads; all keys for an unknown kind, which is refused elsewhere."""
    own = _FIELDS_OF_KIND.get(kind)
    return frozenset(field.name for field in fields(SourceConfig)) if own is None else own | _FIELDS_OF_ALL


def describe_source(source: SourceConfig) -> str:
    """Return a short description of the source for messages."""
    where = source.name if source.path is None else source.path
    text = source.kind if where is None else f"{source.kind} {where}"
    return text if source.documents is None else f"{text} [{source.documents}]"


def locate_source_files(source: SourceConfig, *, section: str | None = None) -> list[SourceFile]:
    """Return the local files of a source; an empty list for digits and for data sets of the hub.

    Args:
        source: The source.
        section: Section of the config that describes the source, for messages.

    Raises:
        InputError: A path does not exist or contains no file.
    """
    if source.kind == "python":
        return locate_standard_library()
    prefix = "" if section is None else f"{section}."
    if source.name is not None:
        folder = local_folder(source.name)
        return [] if folder is None else locate_files(str(folder), option=f"{prefix}name")
    return [] if source.path is None else locate_files(source.path, option=f"{prefix}path")


def pin_revision(source: SourceConfig) -> SourceConfig:
    """Return the source with the newest commit of its data set as `revision`; any other source as it is.

    Raises:
        InputError: The hub cannot be reached or has no such data set, or a revision is given for a local folder.
    """
    if source.name is None:
        return source
    if local_folder(source.name) is None:
        return source if source.revision is not None else replace(source, revision=newest_revision(source.name))
    if source.revision is not None:
        raise InputError(f"revision ({source.revision!r}) is not read for {source.name}, which is a local folder")
    return source


def unit_of_kind(kind: str) -> str:
    """Return the unit in which the size of a source's documents is counted: "byte", "pixel" or "value"."""
    return {"idx": "pixel", "digits": "pixel", "array": "value"}.get(kind, "byte")


def source_bytes(source: SourceConfig) -> int | None:
    """Return the size of a source's files in bytes, an estimate of its documents' size; None if it is unknown.

    It is unknown for compressed files, series, images that are made smaller, data sets of the Hugging Face hub, slices
    of documents, and sources without local files.

    Raises:
        InputError: A path does not exist or contains no file, or a file cannot be read.
    """
    paths = [file.path for file in locate_source_files(source)]
    is_reduced = source.documents is not None or source.downsample > 1
    if not paths or is_reduced or source.name is not None or source.kind == "array":
        return None
    # One file of each kind of name, because there may be very many.
    if any(is_compressed(path) for path in {path.suffix: path for path in paths}.values()):
        return None
    return sum(path.stat().st_size for path in paths if path.exists())


def iterate_documents(source: SourceConfig) -> Iterator[Document]:
    """Return an iterator over the source's documents, in a fixed order and one at a time.

    A document without content (an empty text under its JSON key) is yielded; an empty file is not.

    Args:
        source: The source to read.

    Raises:
        InputError: On the call: a path does not exist or contains no file. During iteration: a file is empty, damaged
            or not in the kind's format, an optional package is missing, or there is no document at all.
    """
    return _checked(source, locate_source_files(source))


def iterate_blocks(source: SourceConfig) -> Iterator[DocumentBlocks]:
    """Return an iterator over the source's documents in blocks; as `iterate_documents`, which holds one in memory.

    Only a text file that is one document is read block by block; all others are held.

    Raises:
        InputError: As `iterate_documents`.
    """
    if source.kind == "text" and source.document_start is None and source.documents is None:
        return _not_empty(source, read_text_blocks(locate_source_files(source)))
    return (
        DocumentBlocks(name, blocks_of(content) if isinstance(content, bytes) else iter([content]))
        for name, content in iterate_documents(source)
    )


def _checked(source: SourceConfig, files: list[SourceFile]) -> Iterator[Document]:
    documents = _read(source, files)
    if source.documents is not None:
        start, stop = parse_slice(source.documents)
        documents = slice_documents(documents, start=start, stop=stop)
    return _not_empty(source, documents)


def _not_empty(source: SourceConfig, documents: Iterator[AnyDocument]) -> Iterator[AnyDocument]:
    is_empty = True
    for document in documents:
        is_empty = False
        yield document
    if is_empty:
        raise InputError(f"source {describe_source(source)} holds no document")


def _read(source: SourceConfig, files: list[SourceFile]) -> Iterator[Document]:
    match source.kind:
        case "text":
            return read_text_files(files, document_start=source.document_start)
        case "jsonl":
            return read_json_lines(files, text_key=source.text_key)
        case "idx":
            # Checked here too, so that a wrong `downsample` is reported before any image is read.
            idx_shape(files[0].path, downsample=source.downsample)
            return read_idx_files(files, levels=source.levels, downsample=source.downsample)
        case "digits":
            return read_digits()
        case "python":
            return read_standard_library(files)
        case "array":
            return read_series(files, columns=source.columns, rows=source.rows)
        case "huggingface":
            assert source.name is not None
            assert source.split is not None
            return read_data_set(
                source.name,
                config_name=source.config_name,
                revision=source.revision,
                split=source.split,
                text_key=source.text_key,
                document_start=source.document_start,
            )


def image_shape(source: SourceConfig) -> tuple[int, int] | None:
    """Return the height and width of the source's images after downsampling, or None for text.

    Raises:
        InputError: An idx file is missing or damaged, or `downsample` does not divide the height and width of its
            images.
    """
    match source.kind:
        case "idx":
            return idx_shape(locate_source_files(source)[0].path, downsample=source.downsample)
        case "digits":
            return DIGITS_SHAPE
        case _:
            return None


def source_levels(source: SourceConfig) -> int | None:
    """Return the number of grey levels of the source's images, or None for text."""
    match source.kind:
        case "idx":
            return source.levels
        case "digits":
            return DIGITS_LEVELS
        case _:
            return None
