"""Text documents: files, JSON lines, the Python standard library, and data sets of the Hugging Face hub."""

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memformer.data.documents import Document
from memformer.data.files import SourceFile, open_source
from memformer.errors import InputError

# Installed packages differ between machines, and tests contain unusual encodings.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


def compile_document_start(pattern: str) -> re.Pattern[bytes]:
    """Return the pattern as a compiled regular expression over bytes.

    Raises:
        InputError: `pattern` is not a regular expression.
    """
    try:
        return re.compile(pattern.encode())
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"document_start ({pattern!r}) is not a regular expression: {error}") from error


def read_text_files(files: Iterable[SourceFile], *, document_start: str | None = None) -> Iterator[Document]:
    """Yield every file as one document, or several if `document_start` is given.

    A file that decompresses to nothing is skipped, unless its path was named itself.

    Args:
        files: The files.
        document_start: A regular expression; a line that matches it as a whole begins a document. None: one document
            per file.

    Raises:
        InputError: A file cannot be read, or a file that was named itself is empty.
    """
    for path, is_explicit in files:
        is_empty = True
        with open_source(path) as stream:
            if document_start is None:
                documents = iter([Document(str(path), stream.read())])
            else:
                lines = ((f"{path}:{number}", line) for number, line in enumerate(stream, start=1))
                documents = split_documents(lines, document_start)
            for document in documents:
                if len(document.content):
                    is_empty = False
                    yield document
        if is_empty and is_explicit:
            raise InputError(f"{path} is empty; a document needs at least one byte")


def split_documents(lines: Iterable[tuple[str, bytes]], document_start: str) -> Iterator[Document]:
    """Yield documents of consecutive lines; each line that matches `document_start` begins a document.

    A document is named after its first line. Lines before the first match are a document of their own; if all of them
    are blank, they belong to the first document instead.

    Args:
        lines: Name and content of each line; the content includes the line ending.
        document_start: A regular expression for a whole line, without its line ending.
    """
    pattern = compile_document_start(document_start)
    first, parts = "", list[bytes]()
    for name, line in lines:
        if pattern.fullmatch(line.rstrip(b"\r\n")) and any(not part.isspace() for part in parts):
            yield Document(first, b"".join(parts))
            parts = []
        if not parts:
            first = name
        parts.append(line)
    if parts:
        yield Document(first, b"".join(parts))


def read_json_lines(files: Iterable[SourceFile], *, text_key: str) -> Iterator[Document]:
    """Yield the text under `text_key` of every line, one line at a time; blank lines are skipped.

    Raises:
        InputError: A file cannot be read, a file that was named itself is empty, or a line is not a JSON object with a
            string under that key.
    """
    for path, is_explicit in files:
        is_empty = True
        with open_source(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                is_empty = False
                name = f"{path}:{number}"
                yield Document(name, _text_of(_parse_line(line, name), text_key=text_key, name=name))
        if is_empty and is_explicit:
            raise InputError(f"{path} is empty; JSON lines need at least one line")


def _parse_line(line: bytes, name: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    # JSON nested more deeply than the interpreter's stack raises RecursionError, which is not a ValueError.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{name} is a JSON {type(record).__name__}; every line must be an object")
    return record


def _text_of(record: Mapping[str, Any], *, text_key: str, name: str) -> bytes:
    if text_key not in record:
        available = ", ".join(sorted(map(str, record))) or "none"
        raise InputError(f"{name} has no key text_key ({text_key!r}); its keys are: {available}")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{name} holds a {type(text).__name__} under {text_key!r}; it must be a string")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds a lone surrogate at character {error.start}; it is not valid text") from error


def locate_standard_library() -> list[SourceFile]:
    """Return the modules of this Python's standard library without tests, sorted by relative path."""
    root = standard_library()
    kept = []
    for folder, subfolders, names in os.walk(root):
        # Installed packages can be far larger than the library: their folders are not entered.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        kept += [path.relative_to(root) for path in paths if path.stat().st_size > 0]
    return [SourceFile(root / module, False) for module in sorted(kept, key=lambda module: module.as_posix())]


def standard_library() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_standard_library(files: Iterable[SourceFile]) -> Iterator[Document]:
    """Yield the modules of the standard library as documents, named by relative path.

    Raises:
        InputError: A file cannot be read.
    """
    root = standard_library()
    for name, content in read_text_files(files):
        yield Document(Path(name).relative_to(root).as_posix(), content)


def read_hub(
    name: str, *, config_name: str | None, split: str, text_key: str, document_start: str | None = None
) -> Iterator[Document]:
    """Stream a data set of the Hugging Face hub, one document per record or split where a record matches.

    Args:
        name: Name of the data set on the hub, or a folder in which it was saved.
        config_name: Configuration of the data set, if it has several.
        split: Split to read, for example `train`.
        text_key: Column that contains the text.
        document_start: A regular expression; a record that matches it as a whole begins a document. Records are then
            treated as lines, and a missing line ending is added. None: one document per record.

    Raises:
        InputError: The `datasets` package is missing, it could not load the data set, or a record has no text under
            `text_key`.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise InputError("kind 'huggingface' needs the extra: pip install 'memformer-lm[datasets]'") from error
    try:
        records = datasets.load_dataset(name, config_name, split=split, streaming=True)
    # The package's own message best explains a failure (no network, no such data set, split or configuration).
    except Exception as error:
        raise InputError(
            f"data set {name!r} (config_name {config_name!r}, split {split!r}) cannot be loaded: {error}"
        ) from error
    named = ((f"{name}:{index}", record) for index, record in enumerate(records))
    texts = ((place, _text_of(record, text_key=text_key, name=place)) for place, record in named)
    if document_start is None:
        yield from (Document(place, text) for place, text in texts)
    else:
        lines = ((place, text if text.endswith(b"\n") else text + b"\n") for place, text in texts)
        yield from split_documents(lines, document_start)
