"""Locating and opening the files of a source."""

import glob
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from memformer.errors import InputError


class SourceFile(NamedTuple):
    """One file of a source.

    Attributes:
        path: The file.
        is_explicit: Whether the path named the file itself, rather than a folder or pattern; an empty file is then an
            error.
    """

    path: Path
    is_explicit: bool


def locate_files(path: str | list[str]) -> list[SourceFile]:
    """Return the files that `path` names; those of a folder or a pattern are sorted by name.

    Empty files are skipped, except a file that is named itself.

    Args:
        path: A file, a folder (searched recursively, hidden files and folders skipped), a glob pattern (`**` is
            recursive), or a list of these in the order to read. `~` is the home folder.

    Raises:
        InputError: A path does not exist, or a folder or pattern contains no file.
    """
    names = [path] if isinstance(path, str) else path
    return [file for name in names for file in _locate(name)]


def _locate(name: str) -> list[SourceFile]:
    path = Path(name).expanduser()
    # A file may be called `a[1].txt`, so an existing path is never treated as a pattern.
    if path.is_dir():
        found = sorted(
            file for file in path.rglob("*") if _has_content(file) and not _is_hidden(file.relative_to(path))
        )
        if not found:
            raise InputError(f"path ({name}) is a folder without any file to read; hidden and empty files are skipped")
        return [SourceFile(file, False) for file in found]
    if path.exists():
        return [SourceFile(path, True)]
    if not glob.has_magic(name):
        raise InputError(f"path ({name}) does not exist")
    # Path.glob does not accept absolute patterns.
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    found = sorted(match for match in matches if _has_content(match))
    if not found:
        raise InputError(f"path ({name}) matches no file to read; hidden and empty files are skipped")
    return [SourceFile(file, False) for file in found]


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def open_source(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading bytes; gzip or xz content is decompressed if its name ends in `.gz` or `.xz`.

    Args:
        path: The file.

    Yields:
        A binary stream of the decompressed content.

    Raises:
        InputError: The file cannot be read, or its compressed data is damaged or truncated.
    """
    try:
        with _open(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"{path} cannot be read: {reason}") from error


def _open(path: Path) -> BufferedIOBase:
    match path.suffix:
        case ".gz":
            return gzip.GzipFile(path, "rb")
        case ".xz":
            return lzma.LZMAFile(path, "rb")
        case _:
            return path.open("rb")
