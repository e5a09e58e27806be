"""The `memformer` entry point: help, unknown commands, and a closed stdout."""

import contextlib
import os

import pytest

from memformer.cli.main import main
from tests.cli.calls import call, refused


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], "memformer train CONFIG.yaml"),
        (["train", "--help"], "memformer train experiments/text.yaml --data.train.path my_book.txt"),
        (["evaluate", "--help"], "memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json"),
        (["generate", "--help"], "cat chapters/*.txt | memformer generate runs/demo --prompt_file -"),
        (["report", "--help"], "memformer report runs/demo"),
        (["--version"], "memformer 0."),
    ],
)
def test_help(argv, shown):
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    assert shown in out


def test_no_command_at_all():
    status, out, err = call()
    assert (status, out) == (2, "")
    assert err.startswith("usage: memformer COMMAND")


def test_an_unknown_command():
    known = "train, evaluate, retention, generate, report, reproduce"
    assert refused("trian") == f"unknown command 'trian'; the commands are {known}"


def test_a_closed_stdout_gives_no_traceback(run_folder, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    errors = (tmp_path / "errors").open("w")
    # Closing a pipe without a reader fails as well; the rest of its buffer is lost, as expected.
    out = os.fdopen(writer, "w")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        assert main(["generate", str(run_folder), "--max_new_tokens", "3"]) == 141
    with contextlib.suppress(BrokenPipeError):
        out.close()
    assert (tmp_path / "errors").read_text() == ""
    assert errors.closed  # otherwise the interpreter would print an error at exit
