"""`memformer generate --save_session`: saving while a prompt is read, and resuming after a kill."""

import io
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from memformer import Memformer, Session
from memformer.cli import prompts
from memformer.utils.files import read_tensors_and_metadata
from memformer.utils.ownership import owned_file
from tests.cli.calls import call, call_json, refused
from tests.training.jobs import run_job

PIECE_TOKENS = 5
PROMPT = "the cat sat on a mat while dogs ran on the cat; "


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(prompts, "_PIECE_TOKENS", PIECE_TOKENS)


def arguments(run_folder, *options):
    return ["generate", run_folder, "--temperature", "0", "--max_new_tokens", "12", "--prompt", PROMPT, *options]


def generate_and_die(argv, num_tokens):
    """Run the command in a process that is killed when the session has read so many tokens."""
    assert run_job(generate_until_killed, argv, num_tokens, count=1).status == -signal.SIGKILL


def generate_until_killed(argv, num_tokens):
    feed = Session.feed

    def feed_and_die(session, part):
        feed(session, part)
        if session.num_tokens[0] >= num_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    Session.feed = feed_and_die
    prompts._PIECE_TOKENS = PIECE_TOKENS
    call(*argv)


def num_read(run_folder, file):
    return Session.load(file, model=Memformer.from_pretrained(run_folder / "best")).num_tokens[0]


def test_a_killed_reading_goes_on_from_its_last_save(run_folder, tmp_path):
    """A killed reading costs the time since the last save, and its result is that of an uninterrupted one."""
    state, whole_state = tmp_path / "state", tmp_path / "whole"
    whole = call_json(*arguments(run_folder, "--save_session", whole_state))
    argv = arguments(run_folder, "--save_session", state, "--save_every_minutes", "1e-9")
    generate_and_die(argv, 30)
    assert num_read(run_folder, state) == 25
    generate_and_die([*argv, "--resume"], 42)
    assert num_read(run_folder, state) == 40
    assert call_json(*argv, "--resume") == whole
    (ours, metadata), (theirs, their_metadata) = (read_tensors_and_metadata(file) for file in (state, whole_state))
    assert metadata == their_metadata
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(file.name for file in tmp_path.iterdir() if ".partial" not in file.name) == ["state", "whole"]


@pytest.mark.parametrize("kind", ["bpe", "file"])
def test_an_interrupted_reading_goes_on_with_the_rest_of_the_prompt(base, run_folder, tmp_path, monkeypatch, kind):
    """After an interrupt, the same command with --resume reads the rest, whatever the tokenizer and the source."""
    if kind == "bpe":
        run_folder = tmp_path / "bpe"
        options = ["--data.tokenizer.kind", "bpe", "--data.tokenizer.vocab_size", "280", "--training.num_updates", "1"]
        call_json("train", base / "config.yaml", "--folder", run_folder, *options)
    (tmp_path / "prompt").write_text(PROMPT.replace(";", "\n") * 2)
    argv = ["generate", run_folder, "--temperature", "0", "--prompt_file", tmp_path / "prompt"]
    argv[2:2] = ["--max_new_tokens", "12"]
    whole = call_json(*argv)
    feed = Session.feed

    def feed_and_signal(session, part):
        feed(session, part)
        if session.num_tokens[0] == 15:
            os.kill(os.getpid(), signal.SIGINT)

    options = ["--save_session", tmp_path / "state"]
    with monkeypatch.context() as patch:
        patch.setattr(Session, "feed", feed_and_signal)
        status, _, error = call(*argv, *options)
    assert status == 130
    assert f"15 tokens read and 0 generated; session saved to {tmp_path / 'state'}, continue with --resume" in error
    if kind == "file":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "prompt").read_bytes())))
        argv[-1] = "-"
    assert call_json(*argv, *options, "--resume") == whole


def test_a_reading_after_another_session_counts_its_own_prompt_only(run_folder, tmp_path):
    """The position in the prompt does not count what the session had read before."""
    call_json("generate", run_folder, "--prompt", "dogs ran", "--max_new_tokens", "3", "--save_session", tmp_path / "a")
    options = ["--load_session", tmp_path / "a"]
    whole = call_json(*arguments(run_folder, *options))
    saving = ["--save_session", tmp_path / "b", "--save_every_minutes", "1e-9"]
    generate_and_die(arguments(run_folder, *options, *saving), 30)
    assert call_json(*arguments(run_folder, *saving, "--resume")) == whole


def test_a_save_happens_only_when_its_time_has_come(run_folder, tmp_path, monkeypatch):
    """The session is saved every so many minutes, five by default."""
    seconds = iter(range(0, 10_000, 100))  # between two pieces
    monkeypatch.setattr("memformer.cli.saving.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    saved, save = [], Session.save

    def save_and_record(session, *args, **kwargs):
        saved.append(session.num_tokens[0])
        save(session, *args, **kwargs)

    monkeypatch.setattr(Session, "save", save_and_record)
    call_json(*arguments(run_folder, "--save_session", tmp_path / "state"))
    # 300 seconds are over at every third piece of 5 tokens. The last saves are before and after the generated tokens.
    assert saved == [15, 30, 45, len(PROMPT), len(PROMPT) + 12]


def test_resuming_is_refused_without_an_interrupted_reading_of_the_same_prompt(run_folder, tmp_path):
    """Another prompt, and a session that is not in the middle of one, are refused."""
    missing = tmp_path / "none" / "state"
    assert f"{missing} does not exist" in refused(*arguments(run_folder, "--save_session", missing, "--resume"))
    assert list(tmp_path.iterdir()) == []
    state = tmp_path / "state"
    saving = ["--save_session", state, "--save_every_minutes", "1e-9"]
    generate_and_die(arguments(run_folder, *saving), 30)
    before = state.read_bytes()
    resume = ["generate", run_folder, "--save_session", state, "--resume"]
    message = refused(*resume, "--prompt", PROMPT.replace("sat", "SAT"))
    assert "the first 25 tokens of the prompt are not those that the saved session has read" in message
    message = refused(*resume, "--prompt", PROMPT[:7])
    assert "the prompt has 7 tokens, but the saved session has read 25 of its prompt; give the same prompt" in message
    assert state.read_bytes() == before
    call_json(*arguments(run_folder, *saving, "--resume"))
    message = refused(*arguments(run_folder, *saving, "--resume"))
    assert "there is no reading to resume; continue the session with --load_session instead of --resume" in message
    assert call("generate", run_folder, "--load_session", state, "--max_new_tokens", "1")[0] == 0


def test_a_session_in_the_middle_of_a_prompt_is_loaded_with_a_warning(run_folder, tmp_path):
    """Loading a session that has read a part of its prompt prints a warning."""
    state = tmp_path / "state"
    generate_and_die(arguments(run_folder, "--save_session", state, "--save_every_minutes", "1e-9"), 30)
    argv = ["generate", run_folder, "--load_session", state, "--max_new_tokens", "1"]
    status, _, error = call(*argv, "--save_session", tmp_path / "other")
    assert status == 0
    warning = f"memformer: warning: {state} was saved after 25 tokens of a prompt, before its end; memformer generate"
    assert warning in error
    (tmp_path / "text").write_text("the cat\n")
    assert warning in call("score", run_folder, tmp_path / "text", "--load_session", state)[2]
    argv[3] = tmp_path / "other"
    assert call(*argv)[2] == ""


def test_a_session_file_in_use_is_refused(run_folder, tmp_path):
    """Two processes cannot save to one session file."""
    state = tmp_path / "state"
    with owned_file(state, option="--save_session"):
        message = refused(*arguments(run_folder, "--save_session", state))
    assert f"{state} is in use by process {os.getpid()} on " in message
    assert message.endswith("or choose another --save_session")
    assert call(*arguments(run_folder, "--save_session", state))[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume is given without --save_session; give the session file with it"),
        (["--save_every_minutes", "1"], "--save_every_minutes is given without --save_session"),
        (["--save_session", "s", "--save_every_minutes", "0"], "save_every_minutes (0.0) must be above 0 and finite"),
        (["--save_session", "s", "--load_session", "s", "--resume"], "--resume and --load_session are both given"),
    ],
)
def test_refused_options_of_saving(run_folder, options, message):
    assert message in refused("generate", run_folder, *options)
