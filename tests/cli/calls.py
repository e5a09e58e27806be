"""Helpers that run the `memformer` command inside the test process."""

import contextlib
import io
import json
import random

from memformer.cli.main import main

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran"]


def call(*argv):
    """Run the command; return exit status, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(argument) for argument in argv])
    return status, out.getvalue(), err.getvalue()


def call_json(*argv):
    status, out, err = call(*argv, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def refused(*argv):
    """Run a command that must fail with exit status 2, one error line and no stdout; return the error message."""
    status, out, err = call(*argv)
    assert status == 2, err
    assert out == ""
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("memformer: error: ")] == lines[-1:]
    assert "Traceback" not in err
    return lines[-1].removeprefix("memformer: error: ")


def make_text(seed):
    words = random.Random(seed)
    return " ".join(words.choice(WORDS) for _ in range(30)) + "\n"
