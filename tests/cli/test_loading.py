"""Loading a trained run in a command: choice of the weights, and error messages for damaged runs."""

import json
import re
import shutil

import pytest
import torch

from memformer import CheckpointError, Memformer, load_model
from tests.cli.calls import call, call_json, make_text, refused
from tests.helpers import tiny_model


def test_best_and_last_weights(copied):
    folder = copied
    best = call_json("evaluate", folder)
    # Change only the best weights, enough to change the result.
    weights = folder / "best"
    model = Memformer.from_pretrained(weights)
    with torch.no_grad():
        model.embedding.weight.mul_(3)
    model.save_pretrained(weights)
    last = call_json("evaluate", folder, "--checkpoint", "last")
    assert last["weights"] == str(folder / "checkpoints" / "update-000000004")
    assert best["weights"] == str(weights)
    assert call_json("evaluate", folder)["with_memory"] != best["with_memory"]
    assert last["with_memory"]["bits_per_byte"] == pytest.approx(best["with_memory"]["bits_per_byte"], abs=0.5)


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_other_documents_are_given_key_by_key(command, run_folder, tmp_path):
    """In a whole section the kind would be overlooked, and JSON lines be read as a text."""
    file = tmp_path / "documents.jsonl"
    file.write_text(json.dumps({"text": "the cat sat"}) + "\n")
    for option in (["--data", f"{{kind: jsonl, path: {file}}}"], [f"--data={{kind: jsonl, path: {file}}}"]):
        assert refused(command, run_folder, *option).startswith("--data is no option: --data.path names the documents")
    assert refused(command, run_folder, "--data.kind", "jsonl").startswith("data.path (None) must be")


def test_a_run_folder_is_not_a_saved_model(run_folder):
    """The first thing that is tried in Python; the message names the folder to give, and the other function."""
    message = rf"run is a run folder; its model is in {re.escape(str(run_folder / 'best'))}, and .*load_run reads it"
    for load in (load_model, Memformer.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(run_folder)


def test_a_relative_path_is_explained_in_another_folder(base, tmp_path, monkeypatch):
    """The config keeps the path as it was written, and the run where the file was."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "book.txt").write_text((make_text(3) + "\n") * 9)
    monkeypatch.chdir(tmp_path / "there")
    options = ["--data.train.path", "book.txt", "--data.max_document_tokens", "32", "--training.num_updates", "1"]
    call_json("train", base / "config.yaml", "--folder", tmp_path / "run", *options)
    assert call("evaluate", tmp_path / "run")[0] == 0
    monkeypatch.chdir(tmp_path)
    expected = (
        f"data.train.path (book.txt) does not exist in this folder; the run was trained on {tmp_path}/there/book.txt: "
        "give the command in the folder from which it was trained"
    )
    for command in ("evaluate", "retention", "inspect"):
        assert refused(command, tmp_path / "run") == expected
    (tmp_path / "there" / "book.txt").unlink()
    assert refused("evaluate", tmp_path / "run") == "data.train.path (book.txt) does not exist"


def test_a_missing_file_is_not_explained_by_another_one(base, tmp_path):
    """The validation documents are where they were; those of training are gone, whatever the folder."""
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text((make_text(3) + "\n") * 9)
    options = ["--data.train.path", tmp_path / "train.txt", "--data.max_document_tokens", "32"]
    options += ["--data.validation.kind", "text", "--data.validation.path", tmp_path / "valid.txt"]
    call_json("train", base / "config.yaml", "--folder", tmp_path / "run", "--training.num_updates", "1", *options)
    (tmp_path / "train.txt").unlink()
    assert refused("evaluate", tmp_path / "run") == f"data.train.path ({tmp_path}/train.txt) does not exist"


def test_a_damaged_last_checkpoint_is_skipped_with_a_warning(copied):
    (copied / "checkpoints" / "update-000000004" / "manifest.json").write_text("{}")
    status, out, err = call("evaluate", copied, "--checkpoint", "last")
    assert status == 0
    assert "update-000000002" in out
    assert "memformer: warning: skipped a damaged checkpoint: " in err


def test_the_folder_of_the_best_weights_is_a_complete_model(run_folder, tmp_path):
    options = ["--prompt", "the cat", "--seed", "5", "--max_new_tokens", "12"]
    expected = call_json("generate", run_folder, *options)["token_ids"]
    assert call_json("generate", run_folder / "best", *options)["token_ids"] == expected
    Memformer.from_pretrained(run_folder / "best").save_pretrained(tmp_path / "bare")
    status, out, err = call("generate", tmp_path / "bare", *options, "--json")
    assert status == 0
    assert json.loads(out)["token_ids"] == expected
    assert f"memformer: warning: {tmp_path / 'bare'} has no tokenizer: its 256 token ids are read as bytes" in err
    tiny_model().save_pretrained(tmp_path / "other")
    message = refused("generate", tmp_path / "other")
    assert "has no tokenizer for its vocabulary of 11 tokens; memformer.data.save_tokenizer writes one" in message


NO_MODEL = (
    "is not a folder; a run folder or a folder from save_pretrained is needed",
    "contains neither config.yaml nor config.json: it is not a run folder or a saved model",
)
NO_LOG = ("has no log.jsonl; a report needs a trained run",) * 2


@pytest.mark.parametrize(("command", "messages"), [("evaluate", NO_MODEL), ("generate", NO_MODEL), ("report", NO_LOG)])
def test_commands_without_a_run_are_refused(command, messages, tmp_path):
    assert "required: run" in refused(command)
    for folder, message in zip((tmp_path / "none", tmp_path), messages, strict=True):
        assert refused(command, folder) == f"{folder} {message}"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("best/model.safetensors", b"damaged", ["best/model.safetensors is damaged"]),
        ("best/model.safetensors", None, ["best/model.safetensors does not exist"]),
        ("best/config.json", b"{", ["best/config.json is not readable JSON"]),
        (
            "best/config.json",
            b'{"model_type": "bert"}',
            ["best/config.json: model_type ('bert') must be one of memformer, lstm"],
        ),
        ("best/config.json", b'{"model_type": "memformer", "num_slotz": 3}', ["'num_slotz'", "mean 'num_slots'?"]),
        ("best/config.json", b'{"model_type": "memformer", "num_slots": -3}', ["num_slots (-3) must be at least 0"]),
        ("best/config.json", b'{"model_type": "memformer"}', ["best/model.safetensors"]),
        ("tokenizer_config.json", b"{", ["tokenizer_config.json cannot be read"]),
        ("tokenizer_config.json", None, ["tokenizer_config.json cannot be read"]),
        ("config.yaml", b"a: [1\n", ["config.yaml is not YAML"]),
        ("config.yaml", b"[]", ["config.yaml does not contain a config: it must be a mapping"]),
        ("config.yaml", b"modle: {}\n", ["unknown key 'modle'"]),
    ],
)
def test_damaged_runs_are_refused(copied, name, content, parts):
    if content is None:
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(content)
    error = refused("evaluate", copied)
    for part in parts:
        assert part in error


def test_a_changed_config_of_a_run_is_refused_unless_its_checksum_is_deleted(copied):
    file = copied / "config.yaml"
    first, *lines = file.read_text().splitlines(keepends=True)
    assert first.startswith("# sha256 of the lines below; to change them by hand, delete this line: ")
    changed = "".join(lines).replace("warmup_updates: ", "warmup_updates: 1")
    for content in (first + changed, first + "".join(lines[:-3])):
        file.write_text(content)
        for argv in (("evaluate", copied), ("generate", copied), ("report", copied), ("train", copied, "--resume")):
            error = refused(*argv)
            assert "config.yaml is damaged or was changed" in error
            assert "if you edited it by hand, delete the first line" in error
    file.write_text(changed)
    assert call("evaluate", copied)[0] == 0


def test_a_run_without_its_best_weights(copied):
    shutil.rmtree(copied / "best")
    assert "has no evaluated weights yet; try the last checkpoint" in refused("evaluate", copied)
    assert call("evaluate", copied, "--checkpoint", "last")[0] == 0


def test_a_tokenizer_of_another_run_is_refused(copied, digits):
    shutil.copy(digits[0] / "tokenizer_config.json", copied)
    assert "has a tokenizer of 17 tokens, but a model with a vocabulary of 256" in refused("generate", copied)
