"""Long work shows itself: progress with the time left on stderr, for every command that can take long."""

import io
import re
from contextlib import redirect_stderr
from hashlib import sha256
from types import SimpleNamespace

import pytest

from memformer.cli import prompts
from memformer.data import files
from memformer.utils import progress
from tests.cli.calls import call, call_json, make_text


@pytest.fixture(autouse=True)
def lines_at_once(monkeypatch):
    """Show every change as a line, as if each took long."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    monkeypatch.setattr(progress, "FIRST_PLAIN_LINE_AFTER", 0.0)
    monkeypatch.setattr(prompts, "_PIECE_TOKENS", 40)


def shown(err, start):
    """Return the pairs (completed, total) of the lines that start with these words; each has the time left."""
    lines = [line for line in err.splitlines() if line.startswith(start)]
    assert all(re.search(r"about \d+ s left$", line) for line in lines)
    pairs = [re.search(r"([\d,]+)/([\d,]+)", line).groups() for line in lines]
    return [tuple(int(number.replace(",", "")) for number in pair) for pair in pairs]


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(make_text(5) * 4)
    return file


def test_evaluating_one_long_document(run_folder, document):
    """`evaluate` on one document shows the tokens read."""
    status, out, err = call("evaluate", run_folder, "--data.kind", "text", "--data.path", document)
    size = document.stat().st_size
    assert status == 0, err
    pairs = shown(err, "evaluating: token")
    assert len(pairs) > 5
    assert pairs == sorted(pairs)
    assert pairs[-1] == (size, size)
    assert shown(err, "tokenizing: byte")[-1] == (size, size)
    assert "evaluating" not in out
    assert shown(call("evaluate", run_folder)[2], "evaluating: token")


def test_checking_files_that_are_not_the_ones_the_run_knows(tmp_path, monkeypatch):
    """The checksums of a corpus are computed in pieces, each of which is shown; known files are not read again."""
    monkeypatch.setattr(files, "_BYTES_READ_AT_ONCE", 100)
    with redirect_stderr(io.StringIO()) as err:
        for name, size in (("a", 250), ("b", 100)):
            (tmp_path / name).write_bytes(bytes(size))
        identities = files.file_identities(files.locate_files(str(tmp_path)))
    assert shown(err.getvalue(), "checking the files: byte") == [(each, 350) for each in (100, 200, 250, 350)]
    assert [each["sha256"] for each in identities] == [sha256(bytes(size)).hexdigest() for size in (250, 100)]
    monkeypatch.setattr(files, "_sha256", None)
    assert files.file_identities(files.locate_files(str(tmp_path)), identities) == identities


def test_reading_a_prompt_and_generating(run_folder, document, monkeypatch):
    """`generate` shows the bytes of the prompt that it has read, and the tokens that it has generated."""
    status, _, err = call("generate", run_folder, "--prompt_file", document, "--max_new_tokens", "5", "--json")
    size = document.stat().st_size
    assert status == 0, err
    pairs = shown(err, "reading: byte")
    assert len(pairs) == -(-size // 40)
    assert pairs[0] == (40, size)
    assert pairs[-1] == (size, size)
    assert shown(err, "generating: token")[-1][1] == 5


def test_a_prompt_of_unknown_size_shows_what_is_read(run_folder, document, monkeypatch):
    class Pipe:
        buffer = document.open("rb")

    monkeypatch.setattr("sys.stdin", Pipe)
    monkeypatch.setattr(prompts, "_file_size", lambda stream: None)
    err = call("generate", run_folder, "--prompt_file", "-", "--max_new_tokens", "0")[2]
    Pipe.buffer.close()
    lines = [line for line in err.splitlines() if line.startswith("reading: byte 40  ")]
    assert len(lines) == 1
    assert "left" not in lines[0]


def test_what_a_resumed_reading_skips_does_not_count_towards_its_speed(monkeypatch, capsys):
    """The time left of a resumed reading is estimated from what it reads, not from what it skips."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(progress, "time", clock)
    with progress.ProgressBar("reading", 100, unit="byte") as bar:
        clock.now = 10.0
        bar.begin_at(60)
        clock.now = 15.0
        bar.advance_to(70)
    assert capsys.readouterr().err == "reading: byte 70/100  2 bytes/s  about 15 s left\n"


def test_sampling_images(digits, tmp_path):
    options = ["--output", tmp_path / "x.png", "--num_images", "2"]
    assert shown(call("generate", digits[0], *options)[2], "sampling: pixel")[-1] == (64, 64)


def test_measuring_retention_on_documents(run_folder, tmp_path):
    """`retention` shows the segments read."""
    err = call("retention", run_folder, "--output", tmp_path / "out", "--delays", "1")[2]
    pairs = shown(err, "reading: segment")
    assert pairs[-1][0] == pairs[-1][1] > 0


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_learning_a_tokenizer_and_tokenizing(base, document, tmp_path, kind, monkeypatch):
    """Training shows the bytes of which the tokenizer is learned and the bytes tokenized, also of one long document."""
    monkeypatch.setattr("memformer.data.streaming.STREAM_BLOCK_BYTES", 100)
    monkeypatch.setattr("memformer.data.tokenizers._BLOCK_CHARACTERS", 100)
    vocabulary = ["--data.tokenizer.kind", kind, "--data.tokenizer.vocab_size", "257"]
    pieces = ["--data.train.path", document, "--data.max_document_tokens", "8", "--data.cache", tmp_path / "cache"]
    options = ["--training.num_updates", "1", "--training.sample_tokens", "0", "--folder", tmp_path / "run"]
    status, _, err = call("train", base / "config.yaml", *vocabulary, *pieces, *options)
    assert status == 0, err
    size = document.stat().st_size
    for task in ("learning the tokenizer", "tokenizing"):
        pairs = shown(err, f"{task}: byte")
        assert len(pairs) == 4
        assert pairs[-1] == (size, size)
    assert shown(err, "training: update")[-1] == (1, 1)
    assert shown(err, "evaluating: token")
    # The parts of a long document have the tokens of the whole.
    monkeypatch.undo()
    whole = call_json("evaluate", tmp_path / "run", "--data.kind", "text", "--data.path", document)
    assert whole["num_bytes"] == size
