"""Ownership of run folders and session files: one process at a time writes into them.

The owner holds an operating system lock on a hidden file. The system releases the lock when the process ends, however
it ends, so a file left by a killed process does not block the next one.
"""

import contextlib
import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from memformer.errors import InputError
from memformer.utils.files import check_can_write, saving
from memformer.utils.progress import print_warning

LOCK_FILE = ".lock"

# Another process holds the lock; the number depends on the system.
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
# Some network mounts have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MOST_OWNER_BYTES = 300
# A process that has just taken the lock may not have written its name yet, or may be about to delete the file.
_NUM_TRIES = 20
_SECONDS_BETWEEN_TRIES = 0.05

if sys.platform == "win32":
    import msvcrt

    # Windows forbids other processes to read locked bytes, so a byte far behind the owner's name is locked.
    _LOCKED_BYTE = 1 << 30

    def _lock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owned_folder(folder: Path, *, option: str) -> contextlib.AbstractContextManager[None]:
    """Own a folder, which is created if missing; at the end, created folders that are still empty are deleted.

    Args:
        folder: The folder.
        option: Option of the command that chooses the folder, for the error message.

    Returns:
        A context manager. On entering it raises an InputError if another process owns the folder, which names the
        process and its host, and a SaveError if the folder cannot be created or written to.
    """
    return _owned(folder / LOCK_FILE, folder, option=option)


def owned_file(file: Path, *, option: str) -> contextlib.AbstractContextManager[None]:
    """Own a file that is replaced as a whole, by a lock beside it; otherwise as `owned_folder`.

    A link stands for its file, which is what is replaced.
    """
    check_can_write(file)  # its message is about the file, not about the lock
    file = file.resolve()
    return _owned(file.with_name(f".{file.name}{LOCK_FILE}"), file, option=option)


@contextlib.contextmanager
def _owned(lock: Path, path: Path, *, option: str) -> Iterator[None]:
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        handle = _take(lock, path, option=option)
        try:
            yield
        finally:
            # Deleted before the lock is released: afterwards, the file may belong to another process.
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _take(lock: Path, path: Path, *, option: str) -> int:
    """Return the handle of the locked file.

    Raises:
        InputError: Another process holds the lock.
        SaveError: The file cannot be written, or its lock fails for another reason.
    """
    owner = ""
    for _ in range(_NUM_TRIES):
        with saving(path), contextlib.ExitStack() as on_failure:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            on_failure.callback(os.close, handle)
            state = _try_to_lock(handle)
            if state == "unsupported":
                print_warning(f"the file system of {path} has no locks: start no other process that writes there")
            if state == "held":
                owner = _read_owner(handle)
            # The previous owner deletes the file, and a lock on a deleted file excludes nobody.
            elif _is_same_file(handle, lock):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}".encode()[:_MOST_OWNER_BYTES])
                on_failure.pop_all()
                return handle
        if owner:
            break
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise InputError(
        f"{path} is in use by {owner or 'another process'}; wait until that process ends, or choose another {option}"
    )


def _try_to_lock(handle: int) -> Literal["locked", "held", "unsupported"]:
    try:
        _lock(handle)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "unsupported"
        if error.errno in _HELD:
            return "held"
        raise
    return "locked"


def _read_owner(handle: int) -> str:
    content = os.read(handle, _MOST_OWNER_BYTES).decode("utf-8", "replace")
    return "".join(character for character in content if character.isprintable())


def _is_same_file(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False
