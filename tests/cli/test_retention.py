"""`memformer retention`: output for runs on recall tasks and on documents, and error messages."""

import json
import os
import re
import signal

import matplotlib.image
import pytest
import yaml

from memformer import Memformer
from memformer.data import load_tokenizer, save_tokenizer
from memformer.evaluation.reading_ahead import AheadReader
from tests.cli.calls import call, call_json, make_text, refused


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny run on documents and one on a recall task; only retention.json and retention.png may be written."""
    base = tmp_path_factory.mktemp("retention")
    (base / "texts").mkdir()
    for seed in range(6):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed) * 4)
    config = {
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": 8,
            "num_slots": 3,
        },
        "data": {
            "train": {"kind": "text", "path": str(base / "texts")},
            "validation_fraction": 0.4,
            "cache": str(base / "cache"),
        },
        "training": {"num_updates": 1, "num_lanes": 2, "rollout_length": 2, "sample_tokens": 0},
    }
    recall = {"task": "associative", "num_facts": [1, 3], "num_keys": 5, "max_distance": 2}
    folders = {}
    for name, data in (("documents", config["data"]), ("recall", {"recall": recall})):
        folders[name] = base / name
        (base / f"{name}.yaml").write_text(yaml.safe_dump({**config, "folder": str(base / name), "data": data}))
        call_json("train", base / f"{name}.yaml")
    return folders


def assert_files(folder, printed):
    assert json.loads((folder / "retention.json").read_text()) == printed
    height, width = matplotlib.image.imread(folder / "retention.png").shape[:2]
    assert height > 400
    assert width > 800


@pytest.mark.parametrize("num_measured", [0, 2])
def test_a_signal_ends_the_reading_and_keeps_what_was_measured(runs, tmp_path, monkeypatch, num_measured):
    distances = [2, 300, 9000] if num_measured else [9000]
    read = AheadReader.read

    def read_and_stop(self, *args, **options):
        read_and_stop.calls += 1
        if read_and_stop.calls == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *args, **options)

    read_and_stop.calls = 0
    monkeypatch.setattr(AheadReader, "read", read_and_stop)
    status, out, error = call("retention", runs["recall"], "--distances", *distances, "--output", tmp_path, "--json")
    assert status == 130
    assert read_and_stop.calls == 10
    if num_measured:
        assert "stopped by SIGINT; 2 distances measured and written" in error
        assert_files(tmp_path, json.loads(out))
        assert [point["distance"] for point in json.loads(out)["points"]] == distances[:num_measured]
    else:
        assert "stopped by SIGINT; nothing was measured yet" in error
        assert not list(tmp_path.iterdir())


def test_retention_of_a_recall_run(runs, tmp_path):
    printed = call_json("retention", runs["recall"])
    assert_files(runs["recall"], printed)
    assert printed["task"] == "associative"
    assert printed["trained_distance"] == 2
    assert printed["num_facts"] == 3
    assert [point["distance"] for point in printed["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert [point["num_tokens"] for point in printed["points"][:2]] == [4 * 8, 5 * 8]
    assert all(point["num_questions"] == 64 * 3 for point in printed["points"])
    peaks = [point["peak_memory_bytes"] for point in printed["points"]]
    assert 0 < peaks[0] <= peaks[-1]
    options = ["--distances", "3", "40", "--num_facts", "1", "--num_episodes", "7", "--questions", "2", "--seed", "5"]
    printed = call_json("retention", runs["recall"], *options, "--output", tmp_path / "new" / "folder")
    assert_files(tmp_path / "new" / "folder", printed)
    assert [(point["distance"], point["num_questions"]) for point in printed["points"]] == [(3, 7), (40, 7)]
    assert printed["max_fact_gap"] == 0
    options = ["--distances", "1", "--max_fact_gap", "1000", "--num_episodes", "2", "--output", tmp_path]
    printed = call_json("retention", runs["recall"], *options)
    assert printed["max_fact_gap"] == 1000
    assert 100 * 8 < printed["points"][0]["num_tokens"] <= (2 * 1001 + 2) * 8
    options = ["--distances", "1", "--facts_per_segment", "2", "--output", tmp_path]
    printed = call_json("retention", runs["recall"], *options)
    assert printed["facts_per_segment"] == 2
    assert printed["points"][0]["num_tokens"] == 4 * 8 - 8  # three facts in two segments
    status, out, _ = call("retention", runs["recall"], "--distances", "3", "--output", tmp_path / "table")
    assert status == 0
    assert "associative, 3 facts; longest distance in training: 2" in out
    assert re.search(r"^3 +48 +[01]\.\d{3} +[01]\.\d{3} +192 +[\d,]+ MiB$", out, re.MULTILINE), out
    assert f"{tmp_path / 'table' / 'retention.png'}" in out


def test_retention_of_a_run_on_documents(runs, tmp_path):
    printed = call_json("retention", runs["documents"])
    assert_files(runs["documents"], printed)
    evaluated = call_json("evaluate", runs["documents"])
    assert printed["num_tokens"] == evaluated["num_tokens"] == sum(p["num_tokens"] for p in printed["positions"])
    mean = sum(p["bits_per_token"] * p["num_tokens"] for p in printed["positions"]) / printed["num_tokens"]
    assert mean == pytest.approx(evaluated["with_memory"]["bits_per_token"], rel=1e-5)
    assert [point["delay"] for point in printed["delays"]["points"]] == [0, 1, 2, 4, 8, 16, 32]
    assert 0 < printed["delays"]["num_tokens"] < printed["num_tokens"]
    options = ["--delays", "5", "3", "--max_tokens", "10", "--num_lanes", "1", "--output", tmp_path]
    printed = call_json("retention", runs["documents"], *options)
    assert_files(tmp_path, printed)
    assert printed["num_documents"] == 1
    assert [point["delay"] for point in printed["delays"]["points"]] == [0, 3, 5]
    assert printed["delays"]["first_segment"] == 5
    status, out, _ = call("retention", runs["documents"], *options)
    assert status == 0
    assert "bits per token by position in the document" in out
    assert "at least 5 segments of 8 tokens before them" in out
    assert f"{tmp_path / 'retention.png'}" in out


def test_retention_reads_the_test_documents_of_a_run_that_has_them(runs, tmp_path):
    """As `evaluate` and `inspect` do: the validation documents have chosen the weights."""
    test = tmp_path / "test.txt"
    test.write_text(make_text(9) * 3)
    options = ["--data.test.kind", "text", "--data.test.path", test, "--folder", tmp_path / "run"]
    call_json("train", runs["documents"], *options)
    printed = call_json("retention", tmp_path / "run", "--delays", "0")
    assert printed["num_tokens"] == test.stat().st_size
    assert printed["num_tokens"] == call_json("evaluate", tmp_path / "run")["num_tokens"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("recall", ["--delays", "1"], "--delays does not apply to a run on a recall task"),
        ("recall", ["--max_tokens", "1"], "--max_tokens does not apply to a run on a recall task"),
        ("recall", ["--num_lanes", "1"], "--num_lanes does not apply to a run on a recall task"),
        ("recall", ["--distances", "0", "3"], "distances (0) must be at least 1"),
        ("recall", ["--distances", "-2"], "distances (-2) must be at least 1"),
        ("recall", ["--num_facts", "6"], "num_facts (6) does not fit the task"),
        (
            "recall",
            ["--facts_per_segment", "0"],
            "facts_per_segment (0, 0) must be a minimum of at least 1 and a maximum not below it",
        ),
        ("recall", ["--num_slots", "9"], "only a model with exchangeable_slots can use another number"),
        ("recall", ["--max_fact_gap", "-1"], "max_fact_gap (-1) must be at least 0"),
        ("recall", ["--num_episodes", "0"], "num_episodes (0) must be at least 1"),
        ("recall", ["--questions", "0"], "questions (0) must be at least 1"),
        ("recall", ["--seed", "-1"], "seed (-1) must be from 0"),
        ("recall", ["--distances", "far"], "distances ('far') must be an integer"),
        ("recall", ["--distances"], "expected at least one argument"),
        ("recall", ["--distance", "3"], "unknown option --distance; did you mean --distances?"),
        ("recall", ["--distances", "1", "--output", "/proc/none"], "/proc/none/retention.json could not be written"),
        ("documents", ["--distances", "1"], "--distances does not apply to a run on documents"),
        ("documents", ["--max_fact_gap", "1"], "--max_fact_gap does not apply to a run on documents"),
        ("documents", ["--facts_per_segment", "1"], "--facts_per_segment does not apply to a run on documents"),
        ("documents", ["--num_facts", "1"], "--num_facts does not apply to a run on documents"),
        ("documents", ["--num_episodes", "1"], "--num_episodes does not apply to a run on documents"),
        ("documents", ["--questions", "1"], "--questions does not apply to a run on documents"),
        ("documents", ["--seed", "1"], "--seed does not apply to a run on documents"),
        ("documents", ["--delays", "-1"], "delays (-1) must be at least 0"),
        ("documents", ["--delays", "1000"], "the longest delay (1000 segments of 8 tokens) must be less than"),
        ("documents", ["--max_tokens", "0"], "max_tokens (0) must be at least 1"),
        ("documents", ["--num_lanes", "0"], "num_lanes (0) must be at least 1"),
    ],
)
def test_refused_retention(runs, kind, options, message):
    assert message in refused("retention", runs[kind], *options)


def test_num_lanes_is_refused_in_an_evaluation_on_a_recall_task(runs):
    assert "--num_lanes does not apply to a run on a recall task" in refused(
        "evaluate", runs["recall"], "--num_lanes", "3"
    )


def test_retention_without_a_run(runs, tmp_path):
    assert "required: run" in refused("retention")
    assert refused("retention", tmp_path) == (
        f"{tmp_path} contains neither config.yaml nor config.json: it is not a run folder or a saved model"
    )
    model = Memformer.from_pretrained(runs["recall"] / "best")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(load_tokenizer(runs["recall"]), tmp_path / "model")
    assert "has no config.yaml, which defines the data to measure on; give a run folder" in refused(
        "retention", tmp_path / "model"
    )


def test_help_of_retention():
    status, out, err = call("retention", "--help")
    assert (status, err) == (0, "")
    for option in ("--distances", "--num_facts", "--delays", "--max_tokens", "memformer retention runs/demo"):
        assert option in out
    assert "memformer retention RUN" in call("--help")[1]
