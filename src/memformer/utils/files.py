"""Atomic file writing: a file appears complete or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memformer.errors import CheckpointError, InputError, InputTypeError, SaveError
from memformer.utils.words import with_article

CHECKSUM = "sha256"
# Some network mounts cannot sync.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path given by the user; as in a shell, `~` at its start is the home folder, `~name` that of a user.

    Raises:
        InputError: The path is empty, as an unset variable of a shell; Python takes it for the current folder.
        InputTypeError: It is neither a string nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(f"a path ({path!r}) is {with_article(type(path).__name__)}; it must be a string or a Path")
    if not str(path):
        raise InputError("a path is empty; name a file or a folder")
    return Path(os.path.expanduser(path))  # noqa: PTH111  pathlib raises an error if there is no such user


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Convert errors while `path` is written to a `SaveError` that names it.

    Yields:
        Nothing.

    Raises:
        SaveError: Writing failed, for example for lack of space or permission.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise SaveError(f"{path} could not be written: {reason or error}") from error


def temporary_sibling(path: Path) -> Path:
    """Return a unique hidden path in the folder of `path`, hence on the same file system."""
    start = path.name[:40]  # a file system allows a name of 255 bytes
    return path.with_name(f".{start}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def atomic_write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `file` by calling `write`, sync it to disk, then rename it to `file`.

    The file keeps the mode of a previous one; a link stays, and the file that it leads to is written.

    Raises:
        SaveError: Writing failed, or `file` is a device, a pipe or another special file; a previous `file` is unchanged
            and the temporary file is deleted.
    """
    _check_is_regular(file)
    file = file.resolve() if file.is_symlink() else file
    partial = temporary_sibling(file)
    try:
        with saving(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = (file if file.exists() else partial).stat().st_mode
            write(partial)
            _set_mode(partial, mode)  # some writers give every file the same
            sync_file(partial)
            partial.replace(file)
            sync_folder(file.parent)
    finally:
        with contextlib.suppress(OSError):  # nothing was written, or the parent is not a folder
            partial.unlink()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a new folder completely or not at all.

    Args:
        path: The folder; it must be new or empty.

    Yields:
        A temporary folder to write files into; it becomes `path` at the end, unless an error is raised.

    Raises:
        InputError: `path` is empty, a file, or contains files.
        SaveError: Writing failed; nothing is left behind.
    """
    folder = user_path(path).absolute()
    if folder.is_symlink():
        folder = folder.resolve()  # the link stays, and the folder that it names is written
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; choose an empty or a new folder for the export")
    partial = temporary_sibling(folder)
    try:
        with saving(folder):
            partial.mkdir(parents=True)
            yield partial
            mode = partial.stat().st_mode & 0o666  # as the user's other new files
            for file in partial.iterdir():
                _set_mode(file, mode)
                sync_file(file)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_can_write(file: Path) -> None:
    """Check, before a long computation, that its result can be written to `file`.

    Raises:
        SaveError: `file` is a folder or a special file, or its parent folder cannot be created or written to.
    """
    _check_is_regular(file)
    file = file.resolve() if file.is_symlink() else file
    folder = file.parent
    while not folder.exists():
        folder = folder.parent
    reason = None
    if file.is_dir():
        reason = errno.EISDIR
    elif not folder.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = errno.EACCES
    if reason is not None:
        raise SaveError(f"{file} could not be written: {os.strerror(reason)}")


def _check_is_regular(file: Path) -> None:
    if file.exists() and not file.is_file() and not file.is_dir():
        raise SaveError(f"{file} could not be written: it is a device, a pipe or another special file")


def _set_mode(file: Path, mode: int) -> None:
    with contextlib.suppress(OSError):  # not supported on some mounts
        file.chmod(mode)


def sync_file(file: Path) -> None:
    """Sync a file to disk, where its file system supports it.

    Raises:
        OSError: Writing failed.
    """
    # Windows and some mounts sync only a file that is open for writing.
    with file.open("r+b") as written:
        sync_handle(written.fileno())


def sync_handle(handle: int) -> None:
    """Sync a file that is open for writing to disk, where its file system supports it.

    Raises:
        OSError: Writing failed.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, where the system supports it: a rename is stored in the folder, not in the file."""
    with contextlib.suppress(OSError):  # not supported on Windows and some network mounts
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        SaveError: Writing failed; see `atomic_write`.
    """
    atomic_write(file, lambda partial: partial.write_bytes(content))


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; bytes of a file name that are not UTF-8 become question marks.

    Raises:
        SaveError: Writing failed; see `atomic_write`.
    """
    atomic_write(file, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        SaveError: Writing failed; see `atomic_write`.
    """
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with a checksum of its tensors in the metadata.

    Tensors that share memory are written once for each name.

    Raises:
        SaveError: Writing failed; see `atomic_write`.
    """
    contiguous, seen = {}, set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        start = value.untyped_storage().data_ptr()
        contiguous[name] = value.clone() if start in seen else value
        seen.add(start)
    metadata = {**(metadata or {}), CHECKSUM: _checksum(contiguous)}
    atomic_write(file, lambda partial: save_file(contiguous, partial, metadata=metadata))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: The file is missing, is not JSON, or does not contain a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; it must be an object")
    return value


def read_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    with _reading(file), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist") from error
    except PermissionError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file.

    The checksum is verified if the file has one; files written by other libraries have none.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return read_tensors_and_metadata(file)[0]


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, of which only the beginning is read.

    Raises:
        CheckpointError: The file is missing or its beginning is damaged.
    """
    with _reading(file), safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def read_tensors_and_metadata(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in a safetensors file, verified as by `read_tensors`, and its metadata.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    with _reading(file), safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        metadata: dict[str, str] = opened.metadata() or {}
    if metadata.get(CHECKSUM, checksum := _checksum(tensors)) != checksum:
        raise CheckpointError(f"{file} is damaged: its content does not match its checksum")
    return tensors, metadata
