"""The `memformer` entry point: help, unknown commands, and streams with any encoding, closed, full or narrow."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from memformer.cli import main as main_module
from memformer.cli.main import main, prepare_streams
from memformer.utils import progress
from memformer.utils.progress import ProgressBar, format_seconds
from tests.cli.calls import call, refused


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], "memformer train CONFIG.yaml"),
        (["train", "--help"], "memformer train experiments/text.yaml --data.train.path my_book.txt"),
        (["evaluate", "--help"], "memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json"),
        (["generate", "--help"], "cat chapters/*.txt | memformer generate runs/demo --prompt_file -"),
        (["score", "--help"], "memformer score runs/logs server.log --top 20"),
        (["inspect", "--help"], "cat huge.log | memformer inspect runs/demo --text -"),
        (["export", "--help"], "memformer export runs/demo --hf exported/demo"),
        (["report", "--help"], "memformer report runs/demo"),
        (["compare", "--help"], "memformer compare runs/book runs/transformer-xl"),
        (["--version"], "memformer 0."),
    ],
)
def test_help(argv, shown):
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    assert shown in out


@pytest.mark.parametrize(
    ("command", "advice"), [("evaluate", "Lower --num_lanes, or use --device cpu"), ("generate", "Use --device cpu")]
)
def test_too_little_device_memory_is_one_line_with_advice(command, advice, monkeypatch):
    def run_out(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nfurther lines")

    monkeypatch.setattr(main_module, f"run_{command}", run_out)
    sentence = f"the device has too little memory: CUDA out of memory. Tried to allocate 12.00 GiB. {advice}\n"
    assert call(command, "runs/demo") == (2, "", f"memformer: error: {sentence}")


def test_no_command_at_all():
    status, out, err = call()
    assert (status, out) == (2, "")
    assert err.startswith("usage: memformer COMMAND")


def test_an_unknown_command():
    known = "train, evaluate, retention, inspect, generate, score, export, report, compare, reproduce"
    assert refused("trian") == f"unknown command 'trian'; the commands are {known}"


@pytest.mark.parametrize("command", ["generate RUN --max_new_tokens 3", "score RUN TEXT"])
def test_a_closed_stdout_gives_no_traceback(run_folder, tmp_path, command):
    (tmp_path / "text").write_text("a\n" * 100)
    argv = command.replace("RUN", str(run_folder)).replace("TEXT", str(tmp_path / "text")).split()
    reader, writer = os.pipe()
    os.close(reader)
    errors = (tmp_path / "errors").open("w")
    # Closing a pipe without a reader fails as well; the rest of its buffer is lost, as expected.
    out = os.fdopen(writer, "w", buffering=1)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        assert main(argv) == 141
    with contextlib.suppress(BrokenPipeError):
        out.close()
    assert (tmp_path / "errors").read_text() == ""
    assert errors.closed  # otherwise the interpreter would print an error at exit


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "shift_jis"])
def test_output_fits_the_encoding_of_the_terminal(run_folder, encoding, tmp_path):
    """Characters that the encoding lacks are printed as question marks; the exit status stays 0."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    options = ["--max_new_tokens", "40", "--seed", "1", "--top_k", "256", "--temperature", "3"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["generate", str(run_folder), *options]) == 0
        assert main(["report", str(tmp_path / "日本 \udcff")]) == 2
    err.flush()
    printed = out.buffer.getvalue()
    expected = json.loads(call("generate", run_folder, *options, "--json")[1])["text"]
    assert "\ufffd" in expected
    assert printed == (expected + "\n").encode(encoding, errors="replace")
    assert "日本 ?".encode(encoding, errors="replace") in err.buffer.getvalue()


def test_closed_streams(run_folder, monkeypatch, capfd):
    """A closed stdin is named; closed stdout and stderr do not end the command."""
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("generate", run_folder, "--prompt_file", "-") == "--prompt_file - reads stdin, but stdin is closed"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", str(run_folder), "--max_new_tokens", "3"]) == 0
    assert main(["evaluate", "/no/such"]) == 2
    sys.stdout.close()
    sys.stderr.close()


def test_no_file_takes_the_place_of_a_closed_stream():
    kept = os.dup(0)
    try:
        os.close(0)
        prepare_streams()
        assert os.path.samestat(os.fstat(0), os.stat(os.devnull))  # noqa: PTH116  0 is a file descriptor
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_full_disk_under_stdout_gives_one_line(run_folder):
    errors = io.StringIO()
    with contextlib.redirect_stdout(_Full()), contextlib.redirect_stderr(errors):
        assert main(["evaluate", str(run_folder), "--json"]) == 2
    assert errors.getvalue() == "memformer: error: [Errno 28] No space left on device\n"


class _Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def draw_bar(monkeypatch, stream, *, columns="80", term="xterm", seconds=(0.5, 10, 30), **variables):
    """Return what a bar prints to a stream if its updates come after these seconds."""
    for name, value in {"COLUMNS": columns, "TERM": term, **variables}.items():
        monkeypatch.setenv(name, value)
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with contextlib.redirect_stderr(stream), ProgressBar("reading", 1000, unit="token") as bar:
        for number, _ in enumerate(seconds, start=1):
            bar.advance_to(100 * number)
    return stream.getvalue()


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    """Plain lines if stderr is no terminal or a dumb one, whatever the variables say."""
    lines = (
        "reading: token 200/1,000  20 tokens/s  about 40 s left\n"
        "reading: token 300/1,000  10 tokens/s  about 70 s left\n"
    )
    assert draw_bar(monkeypatch, io.StringIO()) == lines
    assert draw_bar(monkeypatch, io.StringIO(), FORCE_COLOR="1", TTY_COMPATIBLE="1") == lines
    assert draw_bar(monkeypatch, _Terminal(), term="dumb") == lines
    assert draw_bar(monkeypatch, io.StringIO(), columns="10") == lines
    assert draw_bar(monkeypatch, io.StringIO(), seconds=(0.1, 0.9)) == ""


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_a_bar_fits_the_window(monkeypatch, columns):
    """A bar stays on one line of a narrow window, and has no colour with NO_COLOR."""
    drawn = draw_bar(monkeypatch, _Terminal(), columns=str(columns), NO_COLOR="1")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).splitlines()
    assert any(line.startswith("r") for line in shown)
    assert max(len(line) for line in shown) <= columns
    assert "\x1b[3" not in drawn  # a colour
    assert draw_bar(monkeypatch, _Terminal(), seconds=(0.1, 0.9)).count("read") == 0


def test_durations():
    assert [format_seconds(seconds) for seconds in (0.0, 119.0, 150.0, 7260.0)] == [
        "0 s",
        "119 s",
        "2 min",
        "2 h 1 min",
    ]


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_export_without_the_extra_names_it(tmp_path):
    message = refused("export", tmp_path, "--hf", tmp_path / "out")
    assert message == "memformer.hf needs the package transformers: pip install 'memformer-lm[hf]'"


def test_several_processes_without_the_rest_of_torchruns_environment(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    message = refused("train", base / "config.yaml", "--folder", tmp_path / "run")
    assert message.startswith("WORLD_SIZE is 2, so several processes should train, but ")
    assert message.endswith("start them with torchrun, or unset WORLD_SIZE")


@pytest.mark.parametrize("argv", [["--version"], ["--help"]])
def test_a_full_disk_behind_any_output_is_one_sentence(argv, capsys):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.redirect_stdout(Full()):
        assert main(argv) == 2
    assert capsys.readouterr().err == "memformer: error: [Errno 28] No space left on device\n"


def test_sigterm_while_data_are_prepared_leaves_no_unfinished_files(base, tmp_path):
    """The stack is unwound, as by Ctrl-C; the handler is the command's, so that it needs a process of its own."""
    child = """
import os, signal, sys
from memformer.cli import main
from memformer.data import building

building._publish = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
main.entry_point()
"""
    argv = ["train", base / "config.yaml", "--folder", tmp_path / "run", "--data.cache", tmp_path / "cache"]
    done = subprocess.run([sys.executable, "-c", child, *map(str, argv)], timeout=120, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "cache").iterdir()) == []
