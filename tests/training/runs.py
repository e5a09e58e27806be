"""Tiny runs shared by the training tests, and helpers that read their run folders."""

import json
import random
import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file

from memformer import MemformerConfig
from memformer.data import SourceConfig
from memformer.training.config import DataConfig, RunConfig, TrainingConfig

NUM_UPDATES = 10

REPEATED = ("bits_per_token", "gradient_norm", "learning_rate", "num_tokens")


def write_documents(folder, *, num_documents=7):
    words = random.Random(0)
    folder.mkdir()
    for index in range(num_documents):
        text = " ".join(words.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(13 + 3 * index))
        (folder / f"{index}.txt").write_text(text)


def run_config(base, folder="run", **training):
    """Return a run whose rollouts split documents, with two rollouts per update, that lasts more than one epoch."""
    return RunConfig(
        folder=str(base / folder),
        threads=1,
        device="cpu",
        model=MemformerConfig(
            d_model=16,
            num_heads=2,
            d_ff=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            segment_length=8,
            num_slots=3,
            dropout=0.2,
        ),
        data=DataConfig(
            train=SourceConfig(kind="text", path=str(base / "texts")),
            validation_fraction=0.15,
            cache=str(base / "cache"),
        ),
        training=TrainingConfig(
            **{
                "num_updates": NUM_UPDATES,
                "num_lanes": 2,
                "rollout_length": 2,
                "rollouts_per_update": 2,
                "learning_rate": 0.01,
                "warmup_updates": 3,
                "log_every": 1,
                "evaluate_every": 5,
                "sample_tokens": 4,
                "save_every": 3,
                "keep_checkpoints": 4,
                **training,
            }
        ),
    )


def config_file(config):
    file = Path(config.folder).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    return str(file)


def checkpoint_of(folder, update):
    return folder / "checkpoints" / f"update-{update:09d}"


def drop_checkpoints_after(folder, update):
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > checkpoint_of(folder, update).name:
            shutil.rmtree(checkpoint)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    training = [
        (*(line[key] for key in ("update", *REPEATED)), *line["memory_gradient_norms"])
        for line in lines
        if line["kind"] == "training"
    ]
    evaluation = [(line["update"], line["bits_per_byte"]) for line in lines if line["kind"] == "evaluation"]
    return training, evaluation


def saved_tensors(checkpoint):
    return {
        f"{file}: {name}": tensor
        for file in ("model", "optimizer", "state")
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }
