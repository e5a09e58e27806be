"""One process at a time owns a folder or a file."""

import errno
import os
import platform
import re
import signal

import pytest

from memformer import InputError, SaveError
from memformer.utils import ownership
from memformer.utils.ownership import owned_file, owned_folder


def own(folder):
    return owned_folder(folder, option="--folder")


def test_a_folder_in_use_is_refused_and_the_process_named(tmp_path):
    """A folder belongs to one process; the refusal names it."""
    owner = re.escape(f"process {os.getpid()} on {platform.node()}")
    expected = f"run is in use by {owner}; wait until that process ends, or choose another --folder"
    with own(tmp_path / "run"):
        for _ in range(2):
            with pytest.raises(InputError, match=expected), own(tmp_path / "run"):
                pass
        with own(tmp_path / "other"):
            pass
    with own(tmp_path / "run"):
        pass


def test_a_file_in_use_is_refused(tmp_path):
    """A session file belongs to one process."""
    (tmp_path / "state").write_text("before")
    with owned_file(tmp_path / "state", option="--save_session"):
        message = rf"state is in use by process {os.getpid()} .* choose another --save_session"
        (tmp_path / "link").symlink_to("state")
        for name in ("state", "link"):  # a link is not replaced, but the file that it stands for
            with pytest.raises(InputError, match=message), owned_file(tmp_path / name, option="--save_session"):
                pass
        (tmp_path / "link").unlink()
        with owned_file(tmp_path / "other", option="--save_session"):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    """A dead process owns nothing, although its lock file remains."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with own(tmp_path / "run"):
                os.write(writer, b"owned")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reader, 5) == b"owned"
    os.close(reader)
    os.close(writer)
    with pytest.raises(InputError, match=f"in use by process {child} on "), own(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / ".lock").exists()
    with (
        own(tmp_path / "run"),
        pytest.raises(InputError, match=f"in use by process {os.getpid()} on "),
        own(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_stays_empty_is_deleted_and_another_kept(tmp_path):
    """Nothing is left of a folder into which nothing was written."""
    with own(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with own(tmp_path / "empty"):
        pass
    with own(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "empty",
        "used",
        "used/file",
    ]


def test_a_lock_on_a_file_that_its_owner_has_just_deleted_does_not_count(tmp_path, monkeypatch):
    """Of two processes that wait for a third, only one goes on."""
    lock, calls = ownership._lock, []

    def lock_after_deletion(handle):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lock(handle)

    monkeypatch.setattr(ownership, "_lock", lock_after_deletion)
    with own(tmp_path):
        assert len(calls) == 2
        with pytest.raises(InputError, match="in use"), own(tmp_path):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    """Where a network mount has no locks, the work goes on with a warning."""

    def refuse(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership, "_lock", refuse)
    with own(tmp_path):
        pass
    assert f"warning: the file system of {tmp_path} has no locks: start no other process" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a_file/run", "/proc/none/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, name):
    """An unwritable folder is an error that names it."""
    (tmp_path / "a_file").write_text("")
    with pytest.raises(SaveError, match=f"{name} could not be written: "), own(tmp_path / name):
        pass


def test_another_error_of_the_lock_is_an_error(tmp_path, monkeypatch):
    """A disk error while locking is not taken for another process."""

    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ownership, "_lock", fail)
    with pytest.raises(SaveError, match="run could not be written: Input/output error"), own(tmp_path / "run"):
        pass
