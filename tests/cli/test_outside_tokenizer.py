"""A run with a tokenizer that was made elsewhere keeps it whole, so its file is needed only once."""

import json
import shutil

import pytest

from memformer.data import DocumentEndTokenizer, PretrainedTokenizer
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused
from tests.data.outside import byte_level, sentence_piece, word_piece


@pytest.fixture(scope="session")
def trained(base):
    (base / "outside").mkdir()
    byte_level().save(str(base / "outside" / "tokenizer.json"))
    options = ("--data.tokenizer.kind", "pretrained", "--data.tokenizer.path", base / "outside")
    options += ("--data.end_of_document", "true", "--folder", base / "outside-run", "--training.num_updates", "2")
    result = call_json("train", base / "config.yaml", *options)
    shutil.rmtree(base / "outside")
    return base / "outside-run", result


def test_a_run_is_trained_evaluated_and_resumed_without_the_file(trained, base):
    folder, result = trained
    tokenizer = load_run(folder).tokenizer
    assert isinstance(tokenizer, DocumentEndTokenizer)
    assert tokenizer.inner.fingerprint == PretrainedTokenizer(byte_level()).fingerprint
    assert call_json("evaluate", folder)["with_memory"] == result["with_memory"]
    prompt = "the cat\n\nsat"
    generated = call_json("generate", folder, "--prompt", prompt, "--max_new_tokens", "9", "--seed", "1")
    assert generated["prompt_tokens"] == len(byte_level().encode(prompt).ids)
    assert call_json("train", folder, "--resume", "--training.num_updates", "3")["run"] == str(folder)
    changed = ("--data.tokenizer.path", base / "texts")
    assert "the run began with data.tokenizer.path" in refused("train", folder, "--resume", *changed)


def test_texts_of_tokens_join_although_the_tokenizer_strips_a_first_space(base, tmp_path):
    """As SentencePiece does: decoded alone, every word would lose its space."""
    sentence_piece().save(str(tmp_path / "tokenizer.json"))
    options = ("--data.tokenizer.kind", "pretrained", "--data.tokenizer.path", tmp_path)
    folder = tmp_path / "run"
    call_json("train", base / "config.yaml", *options, "--folder", folder, "--training.num_updates", "1")
    tokenizer, text = load_run(folder).tokenizer, "the the cat\nthe man\n"
    (tmp_path / "text").write_text(text)
    _, out, _ = call("score", folder, tmp_path / "text", "--per", "token", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert "".join(each["text"] for each in found if each.get("kind") == "token") == text
    for seed in ("1", "2", "3"):
        generated = call_json("generate", folder, "--prompt", "the the", "--max_new_tokens", "8", "--seed", seed)
        ids = [*tokenizer.encode(b"the the", "prompt").tolist(), *generated["token_ids"]]
        assert "the the" + generated["text"] == "".join(tokenizer.decode_stream(ids))
    # A text that goes on gets no space in front of it.
    read_only = ("--max_new_tokens", "0", "--save_session")
    call_json("generate", folder, "--prompt", "the tha", *read_only, tmp_path / "begun")
    greedy = ("--max_new_tokens", "5", "--temperature", "0")
    goes_on = call_json("generate", folder, "--load_session", tmp_path / "begun", "--prompt", "s", *greedy)
    at_once = call_json("generate", folder, "--prompt", "the thas", *greedy)
    assert goes_on["token_ids"] == at_once["token_ids"]
    # The first generated token has its space also if this command reads no prompt.
    call_json("generate", folder, "--prompt", "the thas", *read_only, tmp_path / "read")
    for seed in ("1", "2", "3"):
        sampled = ("--max_new_tokens", "3", "--seed", seed)
        goes_on = call_json("generate", folder, "--load_session", tmp_path / "read", *sampled)
        assert goes_on["text"] == call_json("generate", folder, "--prompt", "the thas", *sampled)["text"]
    for number, (first, second) in enumerate([("the the cat\n", "the man\n"), ("the the", " cat\nthe man\n")]):
        (tmp_path / "a").write_text(first)
        (tmp_path / "b").write_text(second)
        saved = tmp_path / f"scored-{number}"
        # Without a generated token, nothing holds the beginning of a line back.
        call_json("generate", folder, "--prompt_file", tmp_path / "a", *read_only, saved)
        _, out, _ = call("score", folder, tmp_path / "b", "--per", "token", "--json", "--load_session", saved)
        again = [json.loads(line) for line in out.splitlines()]
        assert "".join(each["text"] for each in again if each.get("kind") == "token") == second


def test_what_cannot_be_used_is_refused_in_one_sentence(base, tmp_path):
    word_piece().save(str(tmp_path / "tokenizer.json"))
    config = (base / "config.yaml", "--folder", tmp_path / "run", "--data.tokenizer.kind", "pretrained")
    file = tmp_path / "tokenizer.json"
    message = f"data.tokenizer.path: {file} cannot be used: the tokenizer has no tokens for 'T', which would be lost"
    assert message in refused("train", *config, "--data.tokenizer.path", tmp_path)
    missing = tmp_path / "none"
    message = f"data.tokenizer.path: {missing} cannot be read: No such file or directory"
    assert message in refused("train", *config, "--data.tokenizer.path", missing)
    assert "path must be given for kind 'pretrained'" in refused("train", *config)
    path = ("--data.tokenizer.path", tmp_path, "--data.recall.task", "passkey")
    assert "data.recall needs data.tokenizer.kind 'bytes', 'bpe' or 'word', not 'pretrained'" in refused(
        "train", *config, *path
    )


def test_another_kind_does_not_read_the_path(trained, tmp_path):
    options = ("--folder", tmp_path / "run", "--data.tokenizer.kind", "bytes", "--training.num_updates", "1")
    status, _, error = call("train", trained[0], *options)
    assert status == 0, error
    assert "data.tokenizer.kind bytes does not read data.tokenizer.path" in error
