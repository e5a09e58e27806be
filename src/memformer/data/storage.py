"""Writing files so that a crash or a full disk never leaves half of one behind."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memformer.errors import SaveError


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the operating system says while writing into one error about `path`.

    Args:
        path: The file or folder being written.

    Yields:
        Nothing.

    Raises:
        SaveError: The block raised an `OSError`: no space, no permission, not a folder.
    """
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path} could not be written: {error.strerror or error}") from error


def temporary_sibling(path: Path) -> Path:
    """Return an unused hidden path beside `path`, on the same file system, that nobody else will pick."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; where folders cannot be synced (some network mounts) do nothing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` to `path` and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one, never a part.

    Args:
        path: File to write; its folder exists.
        content: The whole content.

    Raises:
        SaveError: It could not be written; what was at `path` before is still there.
    """
    temporary = temporary_sibling(path)
    with saving(path):
        try:
            write_synced(temporary, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
