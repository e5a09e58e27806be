"""Tiny runs for the tests of the commands, one on text and one on images."""

import json
import shutil

import pytest
import yaml

from tests.cli.calls import call_json, make_text


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Documents and the config of a tiny run on them; read-only."""
    base = tmp_path_factory.mktemp("cli")
    (base / "texts").mkdir()
    for seed in range(8):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed))
    (base / "library").mkdir()
    for seed in range(9):
        (base / "library" / f"module_{seed}.py").write_text((make_text(seed) * 9)[: 100 + seed])
    (base / "texts.jsonl").write_text("".join(json.dumps({"body": make_text(seed)}) + "\n" for seed in range(8)))
    config = {
        "folder": str(base / "run"),
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
            "validation_fraction": 0.2,
            "cache": str(base / "cache"),
        },
        "training": {
            "num_updates": 4,
            "num_lanes": 4,
            "rollout_length": 2,
            "learning_rate": 0.02,
            "warmup_updates": 0,
            "log_every": 2,
            "evaluate_every": 2,
            "sample_tokens": 8,
            "save_every": 2,
        },
    }
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    return base


@pytest.fixture(scope="session")
def trained(base):
    """The run folder, which is read-only, and the printed result."""
    result = call_json("train", base / "config.yaml", "--training.learning_rate", "0.03", "--model.num_slots=2")
    return base / "run", result


@pytest.fixture(scope="session")
def run_folder(trained):
    return trained[0]


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copied")


@pytest.fixture(scope="session")
def digits(base):
    folder = base / "digits"
    argv = ["train", base / "config.yaml", "--folder", folder, "--training.num_updates", "2"]
    argv += ["--data.train.kind", "digits", "--data.train.path", "null", "--data.train.documents", ":40"]
    return folder, call_json(*argv)
