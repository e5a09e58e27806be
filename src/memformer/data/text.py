"""Text documents: files, JSON lines, and the Python standard library."""

import io
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from memformer.data.content import open_text
from memformer.data.documents import Document, DocumentBlocks
from memformer.data.files import SourceFile, has_content, walk, without_repetition
from memformer.data.streaming import read_blocks, whole_lines
from memformer.errors import InputError
from memformer.utils.checks import utf_8_of
from memformer.utils.words import with_article

# Installed packages differ between machines, and tests contain unusual encodings.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


def compile_document_start(pattern: str) -> re.Pattern[str]:
    """Return the pattern as a compiled regular expression.

    Raises:
        InputError: `pattern` is not a regular expression.
    """
    try:
        return re.compile(pattern)
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
        InputError: A file cannot be read or is not UTF-8 text, or a file that was named itself is empty.
    """
    for name, blocks in read_text_blocks(files):
        if document_start is None:
            yield Document(name, b"".join(blocks))
        else:
            lines = enumerate(_lines(blocks), start=1)
            yield from split_documents(((f"{name}:{number}", line) for number, line in lines), document_start)


def read_text_blocks(files: Iterable[SourceFile]) -> Iterator[DocumentBlocks]:
    """Yield every file as one document, in blocks; as `read_text_files`, which holds one file in memory.

    Raises:
        InputError: As `read_text_files`.
    """
    for path, is_explicit in files:
        with open_text(path) as stream:
            blocks = read_blocks(stream, str(path))
            first = next(blocks, None)
            if first is not None:
                yield DocumentBlocks(str(path), chain([first], blocks))
            elif is_explicit:
                raise InputError(f"{path} is empty; a document needs at least one byte")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of blocks of bytes, with their line ends."""
    return chain.from_iterable(map(io.BytesIO, whole_lines(blocks)))


def split_documents(lines: Iterable[tuple[str, bytes]], document_start: str) -> Iterator[Document]:
    """Yield documents of consecutive lines; each line that matches `document_start` begins a document.

    A document is named after its first line. Lines before the first match are a document of their own; if all of them
    are blank, they belong to the first document instead.

    Args:
        lines: Name and content of each line, in UTF-8; the content includes the line ending.
        document_start: A regular expression for a whole line, without its line ending.
    """
    pattern = compile_document_start(document_start)
    first, parts = "", list[bytes]()
    for name, line in lines:
        if pattern.fullmatch(line.rstrip(b"\r\n").decode()) and any(not part.isspace() for part in parts):
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
        InputError: A file cannot be read or is not UTF-8 text, a file that was named itself is empty, or a line is not
            a JSON object with a string under that key.
    """
    for path, is_explicit in files:
        is_empty = True
        with open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                is_empty = False
                name = f"{path}:{number}"
                yield Document(name, text_of(_parse_line(line, name), text_key=text_key, name=name))
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


def text_of(record: Mapping[str, Any], *, text_key: str, name: str) -> bytes:
    """Return the text under a key of a record, in UTF-8; `name` is the record's name in messages.

    Raises:
        InputError: The record has no such key, or no valid text under it.
    """
    if text_key not in record:
        available = ", ".join(sorted(map(str, record))) or "none"
        raise InputError(f"{name} has no key text_key ({text_key!r}); its keys are: {available}")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{name} holds {with_article(type(text).__name__)} under {text_key!r}; it must be a string")
    return utf_8_of(text, name)


def locate_standard_library() -> list[SourceFile]:
    """Return the modules of this Python's standard library without tests, sorted by relative path."""
    root = standard_library()
    # Installed packages can be far larger than the library: their folders are not entered.
    files = walk(root, skips=_SKIPPED_FOLDERS.__contains__)
    kept = [path.relative_to(root) for path in files if path.suffix == ".py" and has_content(path)]
    modules = sorted(kept, key=lambda module: module.as_posix())
    return without_repetition(SourceFile(root / module, False) for module in modules)


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
