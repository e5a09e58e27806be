"""Session files of `score` and `generate`: nothing else is replaced, and a text that is refused loses nothing."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from memformer.data import lines as lines_module
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused

LINES = "the cat sat on a mat\nwhile dogs ran\n\nxQ%9 zz!"


class Chunks(io.RawIOBase):
    """A pipe whose chunks arrive one after the other."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)

    def readable(self):
        return True

    def readinto(self, buffer):
        chunk = self.chunks.pop(0) if self.chunks else b""
        buffer[: len(chunk)] = chunk
        return len(chunk)


def give_stdin(monkeypatch, *chunks):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Chunks(*chunks))))


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "text").write_text("the cat sat\n")
    return {
        "score": [tmp_path / "text", "--per", "document"],
        "generate": ["--prompt_file", tmp_path / "text", "--max_new_tokens", "1"],
    }


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_session_replaces_only_the_file_that_it_begins_with(command, arguments, run_folder, tmp_path):
    """Neither another session nor the text that is read."""
    argv = [command, run_folder, *arguments[command]]
    first, second, text = tmp_path / "first", tmp_path / "second", tmp_path / "text"
    for file in (first, second):
        assert call(*argv, "--save_session", file)[0] == 0
    kept = {file: file.read_bytes() for file in (first, second, text)}
    for file, options in ((first, []), (text, []), (second, ["--load_session", first])):
        message = refused(*argv, "--save_session", file, *options)
        assert f"--save_session {file} exists: give --load_session {file} too to go on from it" in message
    assert {file: file.read_bytes() for file in kept} == kept
    (tmp_path / "link").symlink_to(first)
    assert call(*argv, "--load_session", tmp_path / "link", "--save_session", first)[0] == 0
    assert first.read_bytes() != kept[first]


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_session_of_a_process_that_has_just_ended_is_not_replaced(
    command, arguments, run_folder, tmp_path, monkeypatch
):
    """The file did not exist when the command began, but does when it owns it."""
    file = tmp_path / "state"

    @contextlib.contextmanager
    def owned_at_last(path, *, option):
        path.write_text("of the other process")
        yield

    monkeypatch.setattr(f"memformer.cli.{command}.owned_file", owned_at_last)
    message = refused(command, run_folder, *arguments[command], "--save_session", file)
    assert f"--save_session {file} exists" in message
    assert file.read_text() == "of the other process"


def test_what_was_scored_before_a_bad_byte_is_saved(run_folder, tmp_path, monkeypatch):
    """A log that is watched for days ends with the session up to the last good part."""
    monkeypatch.setattr(lines_module, "_PART_TOKENS", 4)
    give_stdin(monkeypatch, b"the cat\nsat on\n", b"a \xff mat\n")
    state = tmp_path / "state"
    status, out, err = call("score", run_folder, "-", "--save_session", state)
    assert status == 2
    assert "is not UTF-8 text at byte offset 17 (0xff)" in err
    assert err.endswith(f"; the session up to there is saved to {state}\n")
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["cat", "on"]
    assert load_run(run_folder).load_session(state).num_tokens == [17]
    give_stdin(monkeypatch, b"the cat\nsat on\n", b"a mat\n")
    found = call_json("score", run_folder, "-", "--save_session", state, "--resume", "--per", "document")
    (tmp_path / "whole").write_text("the cat\nsat on\na mat\n")
    assert found == pytest.approx(call_json("score", run_folder, tmp_path / "whole", "--per", "document"))


def test_what_was_read_of_a_prompt_before_a_bad_byte_is_saved(run_folder, tmp_path, monkeypatch):
    give_stdin(monkeypatch, b"the cat\nsat on\n", b"a \xff mat\n")
    state = tmp_path / "state"
    message = refused("generate", run_folder, "--prompt_file", "-", "--save_session", state)
    assert message.endswith(f"; the session up to there is saved to {state}")
    assert load_run(run_folder).load_session(state).num_tokens == [17]


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_text_that_is_refused_at_once_leaves_no_session(command, run_folder, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff")
    text = [tmp_path / "bad"] if command == "score" else ["--prompt_file", tmp_path / "bad"]
    assert "not UTF-8" in refused(command, run_folder, *text, "--save_session", tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["score", "generate", "evaluate", "inspect"])
def test_a_text_of_unknown_words_is_warned_of(command, base, tmp_path):
    """All of its words are the same token, so that its scores look good and mean nothing."""
    run, file = tmp_path / "run", tmp_path / "text"
    options = ["--training.num_updates", "1", "--data.tokenizer.kind", "word"]
    call_json("train", base / "config.yaml", "--folder", run, *options)
    for text, is_known in (("the cat sat on a mat\n" * 3, True), ("kein Wort davon\n" * 3, False)):
        file.write_text(text)
        argv = {
            "score": [file],
            "generate": ["--prompt_file", file, "--max_new_tokens", "0"],
            "evaluate": ["--data.kind", "text", "--data.path", file],
            "inspect": ["--text", file, "--json"],
        }[command]
        status, _, err = call(command, run, *argv)
        assert status == 0
        names = {"score": str(file), "generate": "the prompt", "evaluate": "the documents", "inspect": str(file)}
        name = names[command]
        expected = (
            f"75% of the tokens of {name} are words outside the vocabulary of the run, which are all read as <unk>"
        )
        assert (expected in err) != is_known, err
        assert ("warning" in err) != is_known


def test_lines_before_a_wrong_byte_are_scored(run_folder, tmp_path):
    """Also if byte and lines arrive together."""
    (tmp_path / "log").write_bytes(LINES.encode() + b"\nthe \xff cat\n")
    status, out, err = call("score", run_folder, tmp_path / "log", "--json", "--save_session", tmp_path / "state")
    assert status == 2
    assert "is not UTF-8 text at byte offset" in err
    assert [json.loads(line)["text"] for line in out.splitlines()] == LINES.split("\n")
    assert (tmp_path / "state").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the wait for a writer cannot be ended")
def test_a_signal_ends_the_wait_for_the_writer_of_a_named_pipe(run_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "memformer", "score", str(run_folder), str(tmp_path / "pipe")]
    command += ["--save_session", str(tmp_path / "state")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / ".state.lock").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            assert "stopped by SIGINT; 0 bytes scored" in process.communicate(timeout=60)[1]
        finally:
            process.kill()
