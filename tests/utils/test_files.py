import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from memformer import CheckpointError, SaveError
from memformer.data import ByteTokenizer, SourceConfig, build_corpus
from memformer.training.logs import JsonLinesSink
from memformer.utils.files import (
    atomic_write,
    check_can_write,
    new_folder,
    read_json,
    read_tensors,
    user_path,
    write_json,
    write_tensors,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_read_as_written(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(7)}
    write_tensors(tmp_path / "new" / "folder" / "t.safetensors", tensors)
    write_json(tmp_path / "j.json", {"é": [1, None]})
    read = read_tensors(tmp_path / "new" / "folder" / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_json(tmp_path / "j.json") == {"é": [1, None]}
    assert names(tmp_path) == ["j.json", "new"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "before")

    def fill_the_disk(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"file\.txt could not be written: .*No space left"):
        atomic_write(file, fill_the_disk)
    assert file.read_text() == "before"
    assert names(tmp_path) == ["file.txt"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "before")

    def stop(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(file, stop)
    assert file.read_text() == "before"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("name", ["a_file/below.txt", "a_folder"])
def test_the_error_names_a_path_that_cannot_be_written(tmp_path, name):
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(SaveError, match=name):
        write_text(tmp_path / name, "text")
    assert names(tmp_path) == ["a_file", "a_folder"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "is not readable JSON"),
        (b"\xff", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "holds a JSON list; it must be an object"),
    ],
    ids=["missing", "cut short", "not UTF-8", "nested too deep", "list"],
)
def test_refused_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "j.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"j\.json {message}"):
        read_json(tmp_path / "j.json")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "header", "folder"])
def test_refused_tensors(tmp_path, damage):
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": torch.ones(100)})
    content = file.read_bytes()
    file.unlink()
    match damage:
        case "empty":
            file.write_bytes(b"")
        case "cut short":
            file.write_bytes(content[:-50])
        case "header":
            file.write_bytes(b"\xff" * 8 + content[8:])
        case "folder":
            file.mkdir()
    with pytest.raises(CheckpointError, match=r"t\.safetensors (does not exist|is damaged)"):
        read_tensors(file)


def test_json_is_indented(tmp_path):
    write_json(tmp_path / "j.json", {"a": 1, "b": [2]})
    text = (tmp_path / "j.json").read_text()
    assert json.loads(text) == {"a": 1, "b": [2]}
    assert text.count("\n") > 1


def refuse_read_only(handle):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")


def refuse_everything(handle):
    raise OSError(errno.EINVAL, "Invalid argument")


def fail_on_files(handle):
    if stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EIO, "Input/output error")


def write_all_kinds(folder):
    """Write a file in each way that the library has."""
    write_tensors(folder / "t.safetensors", {"a": torch.ones(3)})
    log = JsonLinesSink(folder, lines=[], num_updates=0)
    try:
        log.record("training", 1, {})
        log.flush()
    finally:
        log.close()
    (folder / "a.txt").write_text("abc")
    build_corpus(SourceConfig(path=str(folder / "a.txt")), ByteTokenizer(), cache=folder / "cache")


@pytest.mark.parametrize("fsync", [refuse_read_only, refuse_everything])
def test_files_are_saved_where_a_mount_cannot_sync_them(tmp_path, monkeypatch, fsync):
    """A mount that syncs only files open for writing, or none, is no reason not to save."""
    monkeypatch.setattr(os, "fsync", fsync)
    write_all_kinds(tmp_path)
    assert read_tensors(tmp_path / "t.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_disk_error_while_syncing_is_an_error(tmp_path, monkeypatch):
    """An error of the disk is not mistaken for a mount that cannot sync."""
    monkeypatch.setattr(os, "fsync", fail_on_files)
    with pytest.raises(SaveError, match=r"t\.safetensors could not be written: Input/output error"):
        write_all_kinds(tmp_path)
    assert names(tmp_path) == []


def test_a_tilde_is_the_home_folder_as_in_a_shell(tmp_path, monkeypatch):
    """`~` is expanded at the start of a path only, and a name that is no user's is kept."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/run") == tmp_path / "run"
    assert user_path(Path("~")) == tmp_path
    assert user_path("runs/~/run") == Path("runs/~/run")
    assert user_path("~no-such-user.txt") == Path("~no-such-user.txt")


@pytest.mark.parametrize("write", [
    lambda file: write_tensors(file, {"a": torch.ones(2)}), lambda file: write_text(file, "text")
])  # fmt: skip
def test_a_file_has_the_mode_of_the_users_other_files_or_of_its_predecessor(tmp_path, write):
    (tmp_path / "other").touch()
    write(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    with new_folder(tmp_path / "folder") as folder:
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "folder" / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["n" * 255, "\N{EURO SIGN}" * 85])
def test_a_file_may_have_the_longest_name_of_the_file_system(name, tmp_path):
    write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_folder_is_written_where_a_link_points(exists, tmp_path):
    if exists:
        (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with new_folder(tmp_path / "link") as folder:
        (folder / "weights").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "target"]
    assert names(tmp_path / "target") == ["weights"]


def test_special_files_are_not_replaced_and_links_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for check in (check_can_write, lambda file: write_text(file, "text")):
        with pytest.raises(SaveError, match="pipe could not be written: it is a device, a pipe or another"):
            check(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "folder").mkdir()
    for link, target in (("a", "folder/file"), ("b", "folder/new")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "folder" / "file").write_text("old")
    for link, target in (("a", "file"), ("b", "new")):
        check_can_write(tmp_path / link)
        write_text(tmp_path / link, "text")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "folder" / target).read_text() == "text"


def test_a_name_that_is_not_utf_8_can_be_written(tmp_path):
    write_text(tmp_path / "page", "a\udcffb")
    assert (tmp_path / "page").read_text() == "a?b"
