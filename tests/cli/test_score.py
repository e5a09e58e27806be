"""`memformer score`: the same scores as a session and an evaluation, for any split, and continued after a kill."""

import bz2
import io
import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest

from memformer import Session
from memformer.cli import prompts
from memformer.cli.main import main
from memformer.data import lines as lines_module
from memformer.training.run_folder import load_run
from memformer.utils.ownership import owned_file
from tests.cli.calls import call, call_json, make_text, refused
from tests.data.outside import byte_level
from tests.training.jobs import run_job

PART_TOKENS = 7
TEXT = "the cat sat on a mat\nwhile dogs ran\n\nxQ%9 \u65e5\u672c zz!\nthe cat sat\nthe cat ran on"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(lines_module, "_PART_TOKENS", PART_TOKENS)


@pytest.fixture(scope="session")
def runs(base, run_folder):
    """Runs with one kind of tokenizer each."""
    (base / "tokenizer").mkdir()
    byte_level().save(str(base / "tokenizer" / "tokenizer.json"))
    options = {
        "bpe": ("--data.tokenizer.vocab_size", "280"),
        "word": (),
        "pretrained": ("--data.tokenizer.path", base / "tokenizer"),
    }
    for kind, more in options.items():
        argv = ["train", base / "config.yaml", "--folder", base / f"scored-{kind}", "--training.num_updates", "1"]
        call_json(*argv, "--data.tokenizer.kind", kind, *more)
    return {"bytes": run_folder, **{kind: base / f"scored-{kind}" for kind in options}}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text"


def records(*argv, status=0):
    found, out, err = call("score", *argv, "--json")
    assert found == status, err
    return [json.loads(line) for line in out.splitlines()]


def scored(*argv, **options):
    """Return the lines with their values rounded as far as the order of sums can change them."""
    return [(r["line"], r["text"], r["tokens"], r["bytes"], pytest.approx(r["nats"], rel=1e-5))
            for r in records(*argv, **options) if r["kind"] == "line"]  # fmt: skip


def from_stdin(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content if hasattr(content, "read") else io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "word", "pretrained"])
def test_the_sum_is_that_of_an_evaluation_and_of_a_session(runs, base, file, kind):
    tokens = records(runs[kind], file, "--per", "token")
    lines = records(runs[kind], file)
    (total,) = records(runs[kind], file, "--per", "document")
    expected = call_json("evaluate", runs[kind], "--data.kind", "text", "--data.path", file)
    bits = expected["with_memory"]["bits_per_byte"] * expected["num_bytes"]
    assert total["nats"] / math.log(2) == pytest.approx(bits, rel=1e-6)
    assert (total["tokens"], total["bytes"]) == (expected["num_tokens"], expected["num_bytes"])
    assert total["bits_per_token"] == pytest.approx(expected["with_memory"]["bits_per_token"], rel=1e-6)
    run = load_run(runs[kind])
    ids = run.tokenizer.encode(TEXT.encode(), "text")
    assert [record["token_id"] for record in tokens] == ids.tolist()
    assert [record["nats"] for record in tokens] == pytest.approx(run.session().score(ids).tolist(), rel=1e-5)
    assert [line["text"] for line in lines] == TEXT.split("\n")
    assert [line["bytes"] for line in lines] == [len(line.encode()) for line in TEXT.splitlines(keepends=True)]
    for line in lines:
        own = [record["nats"] for record in tokens if record["line"] == line["line"]]
        assert (line["tokens"], line["nats"]) == (len(own), pytest.approx(sum(own)))
        assert line["bits_per_byte"] == pytest.approx(line["nats"] / math.log(2) / line["bytes"])


def test_a_broken_line_score_would_be_noticed(run_folder, file, monkeypatch):
    """The memory counts: erased by another text before, the same lines get other scores."""
    first = scored(run_folder, file)
    from_stdin(monkeypatch, b"zzz\n" * 30 + TEXT.encode())
    assert scored(run_folder, "-")[-1][4] != first[-1][4].expected


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_any_split_of_a_pipe_changes_nothing(runs, file, monkeypatch, kind, size):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for start in range(0, len(TEXT.encode()), size):
            os.write(writer, TEXT.encode()[start : start + size])
        os._exit(0)
    os.close(writer)
    read1 = io.BufferedReader.read1
    with os.fdopen(reader, "rb") as pipe:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=SimpleNamespace(
            read1=lambda count: read1(pipe, min(count, size)), fileno=pipe.fileno)))  # fmt: skip
        assert scored(runs[kind], "-") == scored(runs[kind], file)
    os.waitpid(child, 0)


@pytest.mark.parametrize(("kind", "cut"), [("bytes", 5), ("bpe", 21), ("bpe", 40), ("word", 40), ("word", 59)])
def test_two_runs_print_what_one_run_prints(runs, file, tmp_path, monkeypatch, kind, cut):
    """Also if the text is split in the middle of a line, or of a word."""
    state, content = tmp_path / "state", TEXT.encode()
    from_stdin(monkeypatch, content[:cut])
    first = scored(runs[kind], "-", "--save_session", state)
    from_stdin(monkeypatch, content[cut:])
    assert first + scored(runs[kind], "-", "--load_session", state) == scored(runs[kind], file)


def test_the_session_of_an_unfinished_line_of_subwords_warns_generate(runs, tmp_path, monkeypatch):
    """The state lacks the last word; of bytes it lacks nothing."""
    for kind in ("bpe", "bytes"):
        from_stdin(monkeypatch, b"the cat\nsat on")
        records(runs[kind], "-", "--save_session", tmp_path / kind)
        status, _, err = call(
            "generate", runs[kind], "--load_session", tmp_path / kind, "--max_new_tokens", "1", "--temperature", "0"
        )
        assert status == 0
        assert ("has not read the last 6 bytes of a text that was scored" in err) == (kind == "bpe")


def score_and_die(argv, num_tokens, *, after_save=False):
    """Run the command in a process that is killed once the session has read so many tokens; return what it printed.

    It is killed before it scores more, or after it has saved the session.
    """
    done = run_job(score_until_killed, [str(argument) for argument in argv], num_tokens, after_save, count=1)
    assert done.status == -signal.SIGKILL, done.output
    return done.output


def score_until_killed(argv, num_tokens, after_save):
    score, save = Session.score, Session.save

    def kill(session):
        if session.num_tokens[0] >= num_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_and_score(session, part):
        kill(session)
        return score(session, part)

    def save_and_kill(session, *args, **kwargs):
        save(session, *args, **kwargs)
        kill(session)

    lines_module._PART_TOKENS = PART_TOKENS
    Session.score, Session.save = (score, save_and_kill) if after_save else (kill_and_score, save)
    main(argv)


@pytest.mark.parametrize(
    ("kind", "after_save"),
    [("bytes", False), ("bytes", True), ("bpe", False), ("word", False), ("pretrained", False)],
)
def test_a_killed_scoring_is_resumed_without_losing_a_line(runs, file, tmp_path, kind, after_save):
    """Lines up to the last save were printed; totals, top and exit status are those of one run."""
    (tmp_path / "long").write_text(TEXT + "\n" + make_text(3) + TEXT, encoding="utf-8")
    options = ["--per", "line", "--top", "3", "--threshold", "0.1", "--json"]
    saving = ["--save_session", tmp_path / "state", "--save_every_minutes", "1e-9"]
    argv = ["score", runs[kind], tmp_path / "long", *options]
    expected = records(*argv[1:-1], "--save_session", tmp_path / "whole", status=1)
    out = score_and_die([*argv, *saving], 50, after_save=after_save)
    printed = [json.loads(line) for line in out.splitlines()]
    assert printed
    rest = records(*argv[1:-1], *saving, "--resume", status=1)
    assert approximately(printed + rest) == approximately(expected)
    assert "there is no scoring to resume" in refused(*argv, *saving, "--resume")


@pytest.mark.parametrize(("kind", "cut"), [("bpe", 24), *(("pretrained", cut) for cut in (24, 27, 30, 33))])
def test_a_killed_scoring_that_began_in_the_middle_of_a_line_is_resumed(runs, tmp_path, monkeypatch, kind, cut):
    """The position counts the bytes of its own text, without the beginning of the line that another text left."""
    content, state = (TEXT + "\n" + TEXT).encode(), tmp_path / "state"
    (tmp_path / "whole").write_bytes(content)
    (tmp_path / "rest").write_bytes(content[cut:])
    from_stdin(monkeypatch, content[:cut])
    first = records(runs[kind], "-", "--save_session", tmp_path / "first")
    saving = ["--save_session", state, "--save_every_minutes", "1e-9", "--json"]
    argv = ["score", runs[kind], tmp_path / "rest", *saving]
    out = score_and_die([*argv, "--load_session", tmp_path / "first"], 50)
    printed = [json.loads(line) for line in out.splitlines()]
    rest = records(*argv[1:-1], "--resume")
    whole = records(runs[kind], tmp_path / "whole", "--save_session", tmp_path / "other")
    assert len(printed) > 1
    assert approximately(first + printed + rest) == approximately(whole)


def approximately(found):
    return [{key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
             for key, value in record.items()} for record in found]  # fmt: skip


def test_a_save_is_made_when_its_time_has_come_also_while_a_pipe_is_silent(run_folder, tmp_path, monkeypatch):
    """A kill loses at most the interval: what was scored is saved even if nothing more arrives."""
    seconds = itertools.count(0, 100)
    monkeypatch.setattr("memformer.cli.saving.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(prompts, "_SECONDS_OF_WAITING", 0.01)
    saved, save = [], Session.save

    def save_and_record(session, *args, **kwargs):
        saved.append(session.num_tokens[0])
        save(session, *args, **kwargs)
        if len(saved) == 1:
            os.close(writer)  # only now does the text end

    monkeypatch.setattr(Session, "save", save_and_record)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as waiting:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(waiting))
        os.write(writer, b"cat\n")
        records(run_folder, "-", "--save_session", tmp_path / "state")
    assert saved == [4, 4]


def test_a_signal_prints_what_is_known_and_saves_the_session(run_folder, file, tmp_path, monkeypatch):
    score = Session.score

    def score_and_signal(session, part):
        found = score(session, part)
        if session.num_tokens[0] == 28:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    argv = ["score", run_folder, file, "--top", "1", "--save_session", tmp_path / "state"]
    with monkeypatch.context() as patch:
        patch.setattr(Session, "score", score_and_signal)
        status, out, err = call(*argv)
    assert status == 143
    assert out.startswith("1. line 1: ")
    assert f"28 bytes scored; session saved to {tmp_path / 'state'}, continue with --resume" in err
    status, out, err = call(*argv, "--resume")
    assert (status, err) == (0, "")
    assert out.startswith("1. line 4: ")
    whole = records(run_folder, file, "--top", "1")
    assert approximately(whole) == approximately(
        [r for r in records(run_folder, file, "--per", "line", "--top", "1") if r["kind"] == "top"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(Session, "score", score_and_signal)
        status, _, err = call(*argv[:5])
    assert status == 143
    assert err == "memformer: stopped by SIGTERM; 28 bytes scored\n"


def test_the_threshold_chooses_lines_and_the_exit_status(run_folder, file):
    values = {record["line"]: record["bits_per_byte"] for record in records(run_folder, file)}
    threshold = sorted(values.values())[-2]
    above = [number for number, value in values.items() if value > threshold]
    assert len(above) == 1
    options = ["--threshold", repr(threshold)]
    assert [record["line"] for record in records(run_folder, file, *options, status=1)] == above
    marked = records(run_folder, file, *options, "--per", "line", status=1)
    assert [record["line"] for record in marked if record["is_above_threshold"]] == above
    assert len(marked) == len(values)
    status, out, _ = call("score", run_folder, file, *options, "--per", "line")
    assert [line.startswith("!") for line in out.splitlines()[1:]] == [number in above for number in values]
    assert status == 1
    assert call("score", run_folder, file, "--threshold", "99") == (0, "", "")


def test_text_on_a_terminal(run_folder, tmp_path):
    """Columns have names with units; control characters cannot change the screen."""
    (tmp_path / "log").write_bytes(b"the cat\n\x1b[2Jcat\tsat\n" + b"x" * 2001)
    status, out, _ = call("score", run_folder, tmp_path / "log")
    assert status == 0
    header, first, second, third = out.splitlines()
    assert header.split() == ["line", "bits/byte", "nats", "text"]
    assert first.split()[0] == "1"
    assert first.endswith("  the cat")
    assert second.endswith("  \ufffd[2Jcat\tsat")
    assert third.split()[3] == "x" * 2000
    (tmp_path / "log").write_bytes(b"the cat\n")
    _, out, _ = call("score", run_folder, tmp_path / "log", "--per", "document")
    assert [line.split()[0] for line in out.splitlines()] == ["bits/byte", out.splitlines()[1].split()[0]]
    _, out, _ = call("score", run_folder, tmp_path / "log", "--per", "token")
    assert out.splitlines()[1].split()[0] == "1"
    assert out.splitlines()[1].endswith("  't'")


def test_lines_of_windows_are_shown_without_their_carriage_return(run_folder, tmp_path):
    (tmp_path / "log").write_bytes(b"the cat\r\nsat\r\non\r\n")
    _, out, _ = call("score", run_folder, tmp_path / "log")
    assert [line.split("  ")[-1] for line in out.splitlines()[1:]] == ["the cat", "sat", "on"]
    lines = records(run_folder, tmp_path / "log", "--top", "1", "--context", "2", "--per", "line")
    texts = [line["text"] for line in lines[:3]]
    assert (texts, [line["bytes"] for line in lines[:3]]) == (["the cat", "sat", "on"], [9, 5, 4])
    (top,) = lines[3:]
    assert not any("\r" in text for text in [top["text"], *top["before"], *top["after"]])


def test_the_most_surprising_lines_have_their_context(run_folder, file):
    (best,) = records(run_folder, file, "--top", "1", "--context", "1")
    lines = TEXT.split("\n")
    assert (best["kind"], best["rank"], best["text"]) == ("top", 1, lines[best["line"] - 1])
    assert best["before"] == lines[best["line"] - 2 : best["line"] - 1]
    assert best["after"] == lines[best["line"] : best["line"] + 1]
    _, out, _ = call("score", run_folder, file, "--top", "1")
    assert f"> {best['line']:>9}  {best['text']}" in out.splitlines()


def test_a_compressed_and_an_empty_text(run_folder, tmp_path):
    (tmp_path / "text").write_bytes(bz2.compress(TEXT.encode()))
    assert len(records(run_folder, tmp_path / "text")) == len(TEXT.split("\n"))
    (tmp_path / "empty").write_bytes(b"")
    assert records(run_folder, tmp_path / "empty") == []
    assert records(run_folder, tmp_path / "empty", "--per", "document")[0]["bits_per_byte"] == 0.0


def test_resuming_needs_the_same_text_and_options(run_folder, file, tmp_path):
    (tmp_path / "other").write_text(TEXT.upper(), encoding="utf-8")
    (tmp_path / "short").write_text(TEXT[:9], encoding="utf-8")
    saving = ["--save_session", tmp_path / "state", "--save_every_minutes", "1e-9", "--json"]
    score_and_die(["score", run_folder, file, *saving], 40)
    resume = [*saving, "--resume"]
    before = (tmp_path / "state").read_bytes()
    message = refused("score", run_folder, tmp_path / "other", *resume)
    assert "bytes of the text are not those that the saved session has scored; give the same text" in message
    message = refused("score", run_folder, tmp_path / "short", *resume)
    assert "the text has 9 bytes, but the saved session has scored 42 of its text" in message
    assert "can only be resumed with the same" in refused("score", run_folder, file, *resume, "--top", "2")
    assert (tmp_path / "state").read_bytes() == before
    _, _, err = call("score", run_folder, file, "--load_session", tmp_path / "state", "--per", "document")
    warning = f"warning: {tmp_path / 'state'} was saved after 42 bytes of a text, before its end; memformer score with"
    assert warning in err
    argv = ("generate", run_folder, "--load_session", tmp_path / "state", "--prompt", "a", "--max_new_tokens", "1")
    assert warning in call(*argv)[2]
    damaged = before.replace(b'\\"held\\"', b'\\"hold\\"')
    assert damaged != before
    (tmp_path / "state").write_bytes(damaged)
    assert "its scoring does not match its checksum" in refused("score", run_folder, file, *resume)
    with owned_file(tmp_path / "state", option="--save_session"):
        assert "is in use by process" in refused("score", run_folder, file, *resume)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such"], "/no/such cannot be read: No such file"),
        (["FILE", "--per", "word"], "argument --per: invalid choice: 'word'"),
        (["FILE", "--top", "0"], "top (0) must be at least 1"),
        (["FILE", "--context", "3"], "--context is given without --top"),
        (["FILE", "--top", "1", "--context", "-1"], "context (-1) must be at least 0"),
        (["FILE", "--threshold", "-1"], "threshold (-1.0) must be at least 0"),
        (["FILE", "--threshold", "nan"], "threshold (nan) must be at least 0 and finite"),
        (["FILE", "--threshold", "1", "--per", "token"], "--threshold is about lines; it cannot be given with --per"),
        (["FILE", "--resume"], "--resume is given without --save_session"),
        (["FILE", "--load_session", "/no/such"], "/no/such does not exist"),
        (["FILE", "--save_session", "/dev/null/s"], "/dev/null/s could not be written: Not a directory"),
        (["FILE", "--treshold", "1"], "unknown option --treshold; did you mean --threshold?"),
        ([], "the following arguments are required: file"),
    ],
)
def test_refused_scoring(run_folder, file, options, message):
    assert message in refused("score", run_folder, *[file if each == "FILE" else each for each in options])


def test_what_is_no_text_is_refused(run_folder, digits, file, tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert f"{tmp_path / 'binary'} is not UTF-8 text at byte offset 0 (0x89): it is an image" in refused(
        "score", run_folder, tmp_path / "binary"
    )
    from_stdin(monkeypatch, b"caf\xe9")
    assert "stdin is not UTF-8 text at byte offset 3 (0xe9)" in refused("score", run_folder, "-")
    assert refused("score", digits[0], file) == f"{digits[0]} is a run on images; memformer score reads text"
    monkeypatch.setattr("sys.stdin", None)
    assert refused("score", run_folder, "-") == "FILE - reads stdin, but stdin is closed"
