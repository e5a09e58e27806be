"""`memformer generate`: text from prompts and sessions, saving after an interruption, and error messages."""

import bz2
import io
import itertools
import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from memformer import Memformer, Session
from memformer.cli import prompts
from memformer.cli.generate import run_generate
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused


def generate(run_folder, *options, num=12):
    return call_json("generate", run_folder, "--max_new_tokens", num, *options)


def test_only_the_generated_text_goes_to_stdout(run_folder):
    options = ["--prompt", "the cat", "--seed", "5"]
    expected = generate(run_folder, *options)
    status, out, err = call("generate", run_folder, "--max_new_tokens", "12", *options)
    assert (status, out, err) == (0, expected["text"] + "\n", "")
    assert expected["prompt_tokens"] == 7
    assert generate(run_folder, *options) == expected
    assert generate(run_folder, "--prompt", "the cat", "--seed", "6")["token_ids"] != expected["token_ids"]


def test_a_prompt_from_an_option_a_file_or_stdin_gives_the_same_text(run_folder, tmp_path, monkeypatch):
    prompt = "the cat sat on a mat; é\n"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    expected = generate(run_folder, "--prompt", prompt, "--temperature", "0")
    assert expected["prompt_tokens"] == 25
    assert generate(run_folder, "--prompt_file", tmp_path / "prompt.txt", "--temperature", "0") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert generate(run_folder, "--prompt_file", "-", "--temperature", "0") == expected
    assert generate(run_folder, "--temperature", "0")["prompt_tokens"] == 0


def test_a_compressed_prompt_is_read_and_other_content_refused(run_folder, tmp_path, monkeypatch):
    """A compressed prompt file is decompressed; a prompt that is not UTF-8 text is refused by name, from stdin too."""
    file = tmp_path / "prompt"
    file.write_bytes(bz2.compress(b"the cat"))
    assert generate(run_folder, "--prompt_file", file, num=0)["prompt_tokens"] == 7
    file.write_text("the cat", encoding="utf-16")
    assert f"{file} is not UTF-8 text at byte offset 0 (0xff): it is UTF-16 text" in refused(
        "generate", run_folder, "--prompt_file", file
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bz2.compress(b"the cat"))))
    assert generate(run_folder, "--prompt_file", "-", num=0)["prompt_tokens"] == 7
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "stdin is not UTF-8 text at byte offset 3 (0xe9)" in refused("generate", run_folder, "--prompt_file", "-")


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [("null", 4), ("123", 3), ("[1, 2", 5), ("'a'", 3), ("{b: 1}", 6), (" a ", 3), ("\udcff", 1)],
)
def test_a_prompt_that_looks_like_json_or_yaml_is_read_as_text(run_folder, prompt, num_tokens):
    assert generate(run_folder, "--prompt", prompt, num=0)["prompt_tokens"] == num_tokens


def test_a_resumed_session_equals_one_longer_stream(run_folder, tmp_path):
    greedy = ["--temperature", "0"]
    whole = generate(run_folder, "--prompt", "the cat sat on", *greedy, num=22)
    first = generate(run_folder, "--prompt", "the cat", "--save_session", tmp_path / "a", num=0)
    assert first["token_ids"] == []
    middle = ["--load_session", tmp_path / "a", "--prompt", " sat on", "--save_session", tmp_path / "b"]
    second = generate(run_folder, *middle, *greedy, num=13)
    third = generate(run_folder, "--load_session", tmp_path / "b", *greedy, num=9)
    assert second["token_ids"] + third["token_ids"] == whole["token_ids"]
    assert first["state_bytes"] == third["state_bytes"] == whole["state_bytes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_reading_the_prompt_saves_the_session(run_folder, tmp_path, monkeypatch, number):
    prompt, state = "the cat sat on a mat", tmp_path / "state"
    whole = generate(run_folder, "--prompt", prompt, "--temperature", "0")["token_ids"]
    feed = Session.feed

    def feed_and_signal(session, part):
        feed(session, part)
        if session.num_tokens == [8]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(prompts, "_PIECE_TOKENS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "feed", feed_and_signal)
        status, out, err = call("generate", run_folder, "--prompt", prompt, "--save_session", state, "--json")
    assert (status, json.loads(out)["token_ids"]) == (128 + number, [])
    assert f"stopped by {number.name}; 8 tokens read and 0 generated; session saved to {state}" in err
    rest = ["--load_session", state, "--prompt", prompt[8:], "--temperature", "0"]
    assert generate(run_folder, *rest)["token_ids"] == whole


def test_a_save_is_made_when_its_time_has_come_also_while_a_pipe_is_silent(run_folder, tmp_path, monkeypatch):
    """A prompt from a pipe cannot be given again."""
    seconds = itertools.count(0, 100)
    monkeypatch.setattr("memformer.cli.saving.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(prompts, "_SECONDS_OF_WAITING", 0.01)
    saved, save = [], Session.save

    def save_and_record(session, *args, **kwargs):
        saved.append(session.num_tokens[0])
        save(session, *args, **kwargs)
        if len(saved) == 1:
            os.close(writer)  # only now does the prompt end

    monkeypatch.setattr(Session, "save", save_and_record)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as waiting:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(waiting))
        os.write(writer, b"cat\n")
        generate(run_folder, "--prompt_file", "-", "--save_session", tmp_path / "state", "--max_new_tokens", "2")
    assert saved[0] == 4


def test_a_closed_stdout_keeps_the_session_of_the_prompt(run_folder, tmp_path, monkeypatch):
    """Whoever reads the new text may close the pipe; the prompt was read to its end."""
    monkeypatch.setattr(Session, "stream", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        run_generate([str(run_folder), "--prompt", "the cat", "--save_session", str(tmp_path / "state")])
    assert load_run(run_folder).load_session(tmp_path / "state").num_tokens == [7]


@pytest.fixture
def interrupter(monkeypatch):
    """A thread that sends SIGINT once the command waits for more than the seven tokens that it has read.

    It is sent to this thread, as the system may do, so it does not interrupt the wait of the main thread.
    """
    sessions, is_waiting = [], threading.Event()
    feed, has_arrived = Session.feed, prompts._has_arrived

    def feed_and_keep(session, part):
        sessions.append(session)
        feed(session, part)

    def note_and_wait(stream):
        if sessions and sessions[-1].num_tokens == [7]:
            is_waiting.set()
        return has_arrived(stream)

    def interrupt():
        assert is_waiting.wait(timeout=60)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    monkeypatch.setattr(Session, "feed", feed_and_keep)
    monkeypatch.setattr(prompts, "_has_arrived", note_and_wait)
    monkeypatch.setattr(prompts, "_SECONDS_OF_WAITING", 0.01)
    return threading.Thread(target=interrupt)


def test_a_signal_while_waiting_for_input_or_generating_saves_the_session(
    run_folder, tmp_path, monkeypatch, interrupter
):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as waiting:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(waiting))
        os.write(writer, b"the cat")
        interrupter.start()
        status, _, err = call("generate", run_folder, "--prompt_file", "-", "--save_session", tmp_path / "a")
        interrupter.join()
        os.close(writer)
    assert status == 130
    assert "7 tokens read and 0 generated" in err
    next_token_logits = Session.next_token_logits

    def signal_and_return_logits(session):
        if session.num_tokens == [10]:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_logits(session)

    monkeypatch.setattr(Session, "next_token_logits", signal_and_return_logits)
    options = ["--load_session", tmp_path / "a", "--save_session", tmp_path / "b", "--max_new_tokens", "50", "--json"]
    status, out, err = call("generate", run_folder, *options)
    # The session has moved past the new tokens, so they must be printed.
    assert len(json.loads(out)["token_ids"]) == 4
    assert status == 143
    assert "0 tokens read and 4 generated" in err
    assert Session.load(tmp_path / "b", model=Memformer.from_pretrained(run_folder / "best")).num_tokens == [11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature (-1.0) must be at least 0"),
        (["--temperature", "hot"], "temperature ('hot') must be a number"),
        (["--top_p", "2"], "top_p (2.0) must be above 0 and at most 1"),
        (["--top_k", "0"], "top_k (0) must be at least 1"),
        (["--max_new_tokens", "-1"], "max_new_tokens (-1) must be at least 0"),
        (["--seed", "-1"], "seed (-1) must be from 0"),
        (["--seed", "99999999999999999999"], "seed (99999999999999999999) must be from 0"),
        (["--prompt_file", "/no/such"], "/no/such cannot be read: No such file"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given; give only one of them"),
        (["--load_session", "/no/such"], "/no/such does not exist"),
        (["--output", "x.png"], "--output does not apply to a run on text"),
        (["--num_images", "2"], "--num_images does not apply to a run on text"),
        (["--save_session", "/proc/none/s", "--max_new_tokens", "0"], "/proc/none/s could not be written"),
        # Refused before the prompt is read, which may take hours.
        (["--save_session", "/", "--prompt_file", "/no/such"], "/ could not be written: Is a directory"),
        (["--save_session", "/dev/null/s"], "/dev/null/s could not be written: Not a directory"),
        (["--promt", "a"], "unknown option --promt; did you mean --prompt?"),
    ],
)
def test_refused_generation(run_folder, options, message):
    assert message in refused("generate", run_folder, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a"], "--prompt does not apply to a run on images"),
        (["--load_session", "s"], "--load_session does not apply to a run on images"),
        (["--max_new_tokens", "9"], "--max_new_tokens does not apply to a run on images"),
        (["--num_images", "0"], "num_images (0) must be at least 1"),
        (["--num_images", "1", "--output", "/proc/none/x.png"], "/proc/none/x.png could not be written"),
    ],
)
def test_refused_drawing(digits, options, message):
    assert message in refused("generate", digits[0], *options)


def test_sessions_of_another_model_and_damaged_sessions_are_refused(run_folder, tmp_path):
    config = Memformer.from_pretrained(run_folder / "best").config
    other = Memformer(type(config)(**{**vars(config), "num_slots": 5}))
    Session(other).save(tmp_path / "other")
    assert "belongs to another model" in refused("generate", run_folder, "--load_session", tmp_path / "other")
    (tmp_path / "damaged").write_bytes((tmp_path / "other").read_bytes()[:-20])
    assert "damaged is damaged" in refused("generate", run_folder, "--load_session", tmp_path / "damaged")


def test_image_options_for_a_folder_without_a_tokenizer(run_folder, tmp_path):
    """The message says that a folder has no tokenizer, and what its token ids are taken for."""
    Memformer.from_pretrained(run_folder / "best").half().save_pretrained(tmp_path)
    message = refused("generate", tmp_path, "--output", tmp_path / "x.png")
    assert message == (
        f"--output does not apply to a run on text: {tmp_path} has no tokenizer, so its token ids are read as bytes"
    )
    assert refused("generate", run_folder, "--num_images", "3") == "--num_images does not apply to a run on text"
