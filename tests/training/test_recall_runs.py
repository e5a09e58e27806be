"""Runs on recall tasks in text: training, evaluation, resuming, and refusal before training."""

import json
import math
from pathlib import Path

import pytest
import yaml

from memformer.cli.main import main
from memformer.data import CurriculumConfig, RecallConfig, RecallStream, SourceConfig
from memformer.training.checkpoint import canonical
from memformer.training.config import DataConfig, RunConfig
from memformer.training.run_inputs import find_changed_key
from tests.data.recall.texts import STORIES, haystack_texts, write_stories


def write_run(folder, recall, tokenizer, *, segment_length):
    """Write the config and documents of a tiny run on a recall task in text; return the config file."""
    texts = folder / "texts"
    texts.mkdir()
    for index, text in enumerate(haystack_texts()):
        (texts / f"{index}.txt").write_text(text)
    fields = {
        "folder": str(folder / "run"),
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": segment_length,
            "num_slots": 3,
        },
        "data": {
            "train": {"kind": "text", "path": str(texts)},
            "tokenizer": tokenizer,
            "recall": {"max_distance": 1, **recall},
            "cache": str(folder / "cache"),
        },
        "training": {"num_updates": 2, "num_lanes": 2, "rollout_length": 3, "sample_tokens": 4},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


@pytest.mark.parametrize(
    ("section", "key"),
    [("recall", "decoy_probability"), ("curriculum", "window"), ("train", "documents"), ("model", "dropout")],
)
def test_keys_that_are_newer_than_a_run_had_their_defaults(section, key):
    recall = RecallConfig(curriculum=CurriculumConfig())
    config = RunConfig(data=DataConfig(train=SourceConfig(path="x"), recall=recall))
    saved = canonical(config.to_dict())
    data = saved["data"]
    sections = {"model": saved["model"], "curriculum": data["recall"]["curriculum"], **data}
    sections[section].pop(key)
    assert find_changed_key(saved, config) is None
    sections[section][key] = 7
    assert f".{key}: 7, now it is" in find_changed_key(saved, config)
    data["recall"] = None
    assert find_changed_key(saved, config).startswith("the run began with data.recall: None")


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("task", ["passkey", "babi"])
def test_a_run_trains_evaluates_and_resumes(task, tmp_path, monkeypatch, capsys):
    if task == "babi":
        path = write_stories(tmp_path)
        held_out = write_stories(tmp_path, STORIES.replace("Mary", "Sandra"), "held_out.txt")
        recall = {"task": task, "path": [path], "validation_path": held_out, "num_facts": [2, 4]}
        file = write_run(tmp_path, recall, {"kind": "word", "vocab_size": 40}, segment_length=8)
    else:
        file = write_run(tmp_path, {"task": task}, {"kind": "bytes"}, segment_length=40)
    assert main(["train", file, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["num_facts"] == (4 if task == "babi" else 1)
    assert [point["distance"] for point in trained["points"]] == [1, 2, 4, 8, 16, 32]
    # Resuming uses the run's own tokenizer.
    tokenizer = (tmp_path / "run" / "tokenizer_config.json").read_text()
    monkeypatch.setattr("memformer.training.run_tokenizer.train_tokenizer", None)
    assert main(["train", file, "--json", "--resume", "--training.num_updates", "3"]) == 0
    assert (tmp_path / "run" / "tokenizer_config.json").read_text() == tokenizer
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert len(evaluated["points"]) == 6
    # Documents and stories are part of what the run was made from.
    changed = Path(held_out) if task == "babi" else tmp_path / "texts" / "new.txt"
    changed.write_text(STORIES)
    assert main(["train", file, "--resume", "--training.num_updates", "4"]) == 2
    key = "data.recall.validation_path" if task == "babi" else "data.train"
    assert f"{key} has changed since the run began: {changed} " in capsys.readouterr().err


def test_the_curriculum_sees_the_mean_loss_that_is_logged(tmp_path, monkeypatch):
    seen, observe = [], RecallStream.observe

    def recorded(self, loss, **options):
        seen.append(loss)
        return observe(self, loss, **options)

    monkeypatch.setattr(RecallStream, "observe", recorded)
    recall = {"task": "passkey", "max_distance": 2}
    file = write_run(tmp_path, recall, {"kind": "word", "vocab_size": 40}, segment_length=16)
    assert main(["train", file, "--training.log_every", "1", "--training.rollouts_per_update", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line["bits_per_token"] * math.log(2) for line in lines if line["kind"] == "training"]
    assert logged
    assert seen == pytest.approx(logged, rel=1e-5)
    # While it trains, a run is tested up to four times the longest distance, and in the end up to 32 times.
    distances = [{int(key.rpartition("_")[2]) for key in line if "accuracy_at_" in key} for line in lines]
    assert [max(found) for found in distances if found] == [8]
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert max(point["distance"] for point in result["points"]) == 64


def test_missing_stories_are_named_with_their_option(tmp_path, capsys):
    stories, missing = write_stories(tmp_path), str(tmp_path / "none.txt")
    file = write_run(
        tmp_path, {"task": "babi", "path": stories, "validation_path": missing}, {"kind": "word"}, segment_length=8
    )
    assert main(["train", file]) == 2
    assert f"error: data.recall.validation_path ({missing}) does not exist\n" in capsys.readouterr().err


def test_a_run_whose_segments_are_too_short_is_refused_before_it_trains(tmp_path, capsys):
    path = write_stories(tmp_path)
    longer = write_stories(tmp_path, STORIES.replace("Where is", "Where in the garden is"), "longer.txt")
    recall = {"task": "babi", "path": path, "validation_path": longer, "num_facts": [1, 4]}
    file = write_run(tmp_path, recall, {"kind": "word"}, segment_length=6)
    assert main(["train", file]) == 2
    error = capsys.readouterr().err
    assert "model.segment_length (6) must be at least 7" in error
    assert "update" not in error
