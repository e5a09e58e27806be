"""Locating the files of a source, and their identity."""

import fnmatch
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from memformer.errors import InputError
from memformer.utils.files import user_path
from memformer.utils.progress import ProgressBar

_BYTES_READ_AT_ONCE = 1 << 22


class SourceFile(NamedTuple):
    """One file of a source.

    Attributes:
        path: The file.
        is_explicit: Whether the path named the file itself, rather than a folder or pattern; an empty file is then an
            error.
    """

    path: Path
    is_explicit: bool


def locate_files(path: str | list[str], *, option: str = "path") -> list[SourceFile]:
    """Return the files that `path` names; those of a folder or a pattern are sorted by name.

    Empty files are skipped, except a file that is named itself. Symbolic links are followed everywhere. A file that is
    reached twice (through a link, or by two entries of a list) is returned once, where it is reached first.

    Args:
        path: A file, a folder (searched recursively, hidden files and folders skipped), a glob pattern (`**` is
            recursive), or a list of these in the order to read. `~` is the home folder.
        option: Name of the option that holds the path, for messages.

    Raises:
        InputError: A path does not exist or cannot be read, a folder or pattern contains no file, or a symbolic link in
            it that leads nowhere.
    """
    found: list[SourceFile] = []
    for name in [path] if isinstance(path, str) else path:
        try:
            found += _locate(name, option)
        except OSError as error:
            raise InputError(f"{option} ({name}) cannot be read: {error.filename}: {error.strerror}") from error
    return without_repetition(found)


def without_repetition(files: Iterable[SourceFile]) -> list[SourceFile]:
    """Return the files in order; of several paths to one file, the first is kept."""
    once: dict[Path, SourceFile] = {}
    for file in files:
        once.setdefault(file.path.resolve(), file)
    return list(once.values())


def _locate(name: str, option: str) -> list[SourceFile]:
    if not name:
        raise InputError(f"{option} ({name!r}) is empty; it would mean the current folder, whose name is '.'")
    path = user_path(name)
    # A file may be called `a[1].txt`, so an existing path is never treated as a pattern.
    if path.is_dir():
        found = _with_content(walk(path, skips=_is_hidden), option)
        if not found:
            raise InputError(
                f"{option} ({name}) is a folder without any file to read; hidden and empty files are skipped"
            )
        return [SourceFile(file, False) for file in found]
    if path.exists():
        return [SourceFile(path, True)]
    if not glob.has_magic(name):
        raise InputError(f"{option} ({name}) does not exist")
    matches = _expand(Path(path.anchor), path.relative_to(path.anchor).parts)
    found = _with_content(matches, option)
    if not found:
        raise InputError(f"{option} ({name}) matches no file to read; hidden and empty files are skipped")
    return [SourceFile(file, False) for file in found]


def _with_content(paths: Iterable[Path], option: str) -> list[Path]:
    """Return the files that are not empty, sorted and each once.

    Raises:
        InputError: A path is a symbolic link that leads nowhere: its file would be missing without a word.
    """
    found = sorted(set(paths))
    for path in found:
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{option}: {path} is a symbolic link to {path.readlink()}, which does not exist; delete the link, or "
                "name the data more closely"
            )
    return [path for path in found if has_content(path)]


def is_named_by(name: str, path: Path) -> bool:
    """Return whether a folder or a pattern, as `locate_files` reads it, names a file that may not exist yet.

    Args:
        name: The folder or pattern.
        path: The resolved path of the file.
    """
    outer = user_path(name)
    pattern: tuple[str, ...] = ("**",)
    if not outer.is_dir():
        if outer.exists() or not glob.has_magic(name):
            return False
        parts = outer.parts
        fixed = [glob.has_magic(part) for part in parts].index(True)
        outer, pattern = Path(*parts[:fixed]), parts[fixed:]
    outer = outer.resolve()
    return path.is_relative_to(outer) and _match(pattern, path.relative_to(outer).parts)


def _match(parts: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Return whether the parts of a pattern match the names of a path, by the rules of `_expand`."""
    if not parts or not names:
        return not parts and not names
    part, rest = parts[0], parts[1:]
    if part == "**":
        return _match(rest or ("*",), names) or (not _is_hidden(names[0]) and _match(parts, names[1:]))
    is_skipped = glob.has_magic(part) and _is_hidden(names[0]) and not _is_hidden(part)
    return not is_skipped and fnmatch.fnmatchcase(names[0], part) and _match(rest, names[1:])


def _expand(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield the paths below a folder that match the parts of a pattern; `*` and `**` skip hidden names.

    Unlike those of `glob`, they say which folder cannot be read, and end where symbolic links lead in circles.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        below = _below(folder, _is_hidden, entered={folder.resolve()}) if folder.is_dir() else ()
        for each in [folder, *(path for path, is_folder in below if is_folder)]:
            yield from _expand(each, rest or ("*",))
    elif not glob.has_magic(part):
        if (folder / part).exists() or (folder / part).is_symlink():
            yield from _expand(folder / part, rest)
    elif folder.is_dir():
        for each in folder.iterdir():
            is_skipped = _is_hidden(each.name) and not _is_hidden(part)
            if not is_skipped and fnmatch.fnmatchcase(each.name, part):
                yield from _expand(each, rest)


def walk(folder: Path, *, skips: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the files below a folder; a folder that is reached twice through symbolic links is entered once.

    Args:
        folder: The folder.
        skips: Whether a file or folder of this name is skipped.
    """
    return (path for path, is_folder in _below(folder, skips, entered={folder.resolve()}) if not is_folder)


def _below(folder: Path, skips: Callable[[str], bool], *, entered: set[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the paths below a folder, and whether each is a folder."""
    for path in sorted(path for path in folder.iterdir() if not skips(path.name)):
        if not path.is_dir():
            yield path, False
        elif (target := path.resolve()) not in entered:
            entered.add(target)
            yield path, True
            yield from _below(path, skips, entered=entered)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def has_content(path: Path) -> bool:
    """Return whether a path is a file with at least one byte, possibly through symbolic links."""
    return path.is_file() and path.stat().st_size > 0


def check_is_file(path: Path) -> None:
    """Check that a path is a file, which can be read again.

    Raises:
        InputError: It is a pipe or a device.
    """
    if not path.is_file():
        raise InputError(f"{path} is a pipe or a device; a run needs files, which can be read again")


def file_status(path: Path) -> dict[str, Any]:
    """Return a file's resolved path, size in bytes, and times of modification and of change in nanoseconds.

    A file whose status is the same has the same content, unless someone took pains to hide the change.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return {
        "path": str(path.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }


def file_identities(files: Iterable[SourceFile], known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return the status of every file with the SHA-256 of its content, under `sha256`.

    Reading large files shows its progress on stderr.

    Args:
        files: The files.
        known: Earlier identities; a file whose status is among them is not read again.

    Raises:
        InputError: A file cannot be read, or is a pipe or a device.
    """
    checksums = {_status_key(identity): identity["sha256"] for identity in known}
    states = []
    for file in files:
        states.append(file_status(file.path))
        check_is_file(file.path)
    num_bytes = sum(status["bytes"] for status in states if _status_key(status) not in checksums)
    with ProgressBar("checking the files", num_bytes, unit="byte") as progress:
        return [
            {**status, "sha256": checksums.get(_status_key(status)) or _sha256(Path(status["path"]), progress)}
            for status in states
        ]


def _status_key(identity: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(str(identity.get(name)) for name in ("path", "bytes", "modified_ns", "changed_ns"))


def _sha256(path: Path, progress: ProgressBar) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_BYTES_READ_AT_ONCE):
                digest.update(piece)
                progress.advance(len(piece))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
