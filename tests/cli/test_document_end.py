"""Runs with an end-of-document token: trained, resumed and evaluated like others; generation stops by itself."""

import json

import pytest

from memformer import InputError, Session
from memformer.data import document_end_of
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="session")
def ended(base):
    """A run on words with the token: few words, so that it is generated soon."""
    argv = ["train", base / "config.yaml", "--folder", base / "ended", "--data.end_of_document", "true"]
    return base / "ended", call_json(*argv, "--data.tokenizer.kind", "word")


def test_a_run_is_trained_and_evaluated_with_the_token(ended, base):
    folder, trained = ended
    run = load_run(folder)
    without = call_json("train", base / "config.yaml", "--folder", base / "words", "--data.tokenizer.kind", "word")
    assert run.tokenizer.vocab_size == load_run(base / "words").tokenizer.vocab_size + 1 == run.model.vocab_size
    assert trained["num_bytes"] == without["num_bytes"]
    assert trained["num_tokens"] == without["num_tokens"] + 2  # held-out documents
    assert call_json("evaluate", folder)["with_memory"] == trained["with_memory"]
    # Documents of another source end with it, too.
    data = ("--data.kind", "text", "--data.path", base / "texts" / "0.txt")
    assert (
        call_json("evaluate", folder, *data)["num_tokens"]
        == 32
        == (call_json("evaluate", base / "words", *data)["num_tokens"] + 1)
    )


def test_generation_stops_at_the_token_and_never_prints_it(ended):
    folder = ended[0]
    end = document_end_of(load_run(folder).tokenizer)
    result = call_json("generate", folder, "--seed", "1", "--max_new_tokens", "2000")
    assert len(result["token_ids"]) < 2000
    assert result["token_ids"].index(end) == len(result["token_ids"]) - 1
    status, out, _ = call("generate", folder, "--seed", "1", "--max_new_tokens", "2000")
    assert (status, out) == (0, result["text"] + "\n")
    assert result["text"] == load_run(folder).tokenizer.inner.decode(result["token_ids"][:-1]).decode()


def test_a_session_saved_after_the_end_of_its_document_says_so(ended, tmp_path):
    warning = "the document has ended"
    argv = ["generate", ended[0], "--seed", "1", "--save_session", tmp_path / "session", "--max_new_tokens"]
    assert warning not in call(*argv, "1")[2]
    (tmp_path / "session").unlink()
    assert warning in call(*argv, "2000")[2]


def test_a_session_loaded_from_a_run_stops_by_itself(ended, tmp_path):
    run = load_run(ended[0])
    end = document_end_of(run.tokenizer)
    expected = call_json("generate", ended[0], "--seed", "1", "--max_new_tokens", "2000")["token_ids"]
    session = run.session()
    assert session.generate(2000, seed=1) == expected
    rows = run.session(batch_size=3).generate(2000, seed=1)
    assert all(row.index(end) == len(row) - 1 for row in rows)
    run.session().save(tmp_path / "session")
    assert run.load_session(tmp_path / "session").generate(2000, seed=1) == expected
    # It is a default: an empty list lets the session go on, and a session of the model alone has none.
    assert len(run.session().generate(len(expected) + 5, seed=1, stop_token_ids=[])) == len(expected) + 5
    assert len(Session(run.model).generate(len(expected) + 5, seed=1)) == len(expected) + 5
    with pytest.raises(InputError, match="stop token id"):
        Session(run.model, stop_token_ids=[run.model.vocab_size])


def test_a_run_is_resumed_with_the_token_only(ended):
    folder = ended[0]
    message = "the run began with data.end_of_document: True, now it is False; a run cannot be resumed"
    assert message in refused("train", folder, "--resume", "--data.end_of_document", "false")
    result = call_json("train", folder, "--resume", "--training.num_updates", "6")
    assert json.loads((folder / "evaluation.json").read_text())["num_tokens"] == result["num_tokens"]


def test_data_without_ends_of_documents_are_refused(base):
    config = base / "config.yaml"
    option = ("--data.end_of_document", "true", "--folder", base / "refused")
    images = ("--data.train.kind", "digits", "--data.train.path", "null")
    assert "data.end_of_document is for texts; data.train.kind ('digits')" in refused("train", config, *images, *option)
    message = "data.recall and data.end_of_document are both given; a recall task has no documents to end"
    assert message in refused("train", config, "--data.recall.task", "fact", *option)
