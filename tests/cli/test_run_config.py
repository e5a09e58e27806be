"""How `memformer train` reads its config and options: types of values, and sections of another model or source."""

import functools

import pytest
import yaml

from memformer.cli import run_config
from memformer.cli.run_config import parse_run_config
from memformer.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Build each parser once, because that takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_config, "train_parser", functools.cache(run_config.train_parser))
        yield


@pytest.fixture
def read(tmp_path):
    """Return a function that parses a config and options; it returns the config and the warnings."""

    def parse(given, *options):
        file = tmp_path / "config.yaml"
        file.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
        warnings = []
        return parse_run_config([str(file), *options], warn=warnings.append)[0], warnings

    return parse


def test_numbers_may_be_written_in_any_way(read):
    """Integers such as 1e3, and 1e-3 that YAML reads as a text, are numbers in a file and as options."""
    text = "training: {num_updates: 1e3, learning_rate: 1e-3, warmup_updates: '7', betas: [5e-1, 0.75]}"
    options = ["--training.num_lanes=4.0", "--model.num_slots", "8.0", "--threads", "1e0", "--data.recall.max_distance"]
    config, _ = read(text, *options, "2e1")
    training = config.training
    assert (training.num_updates, training.learning_rate, training.warmup_updates) == (1000, 0.001, 7)
    assert (training.betas, training.num_lanes, config.model.num_slots) == ((0.5, 0.75), 4, 8)
    assert (config.threads, config.data.recall.max_distance) == (1, 20)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: {num_slots: many}", [], "model.num_slots ('many') must be an integer"),
        ("training: {compiled: 1}", [], "training.compiled (1) must be true or false"),
        ("training: {method: magic}", [], "training.method ('magic') must be one of replay, bptt, checkpoint"),
        ("data: {validation: {kind: web}}", [], "data.validation.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--model.num_slots", "2.5"], "model.num_slots (2.5) must be an integer"),
        ("seed: 0", ["--training.learning_rate=fast"], "training.learning_rate ('fast') must be a number"),
        ("seed: 0", ["--data.train.kind", "web"], "data.train.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--data.validation.kind", "web"], "data.validation.kind ('web') must be one of text, jsonl"),
        ("seed: 0", ["--threads", "many"], "threads ('many') must be an integer"),
        ("seed: 0", ["--model.forgetting_speeds", "[1]"], "model.forgetting_speeds ([1]) must be 2 numbers"),
        ("seed: 0", ["--data.recall.num_facts", "1"], "data.recall.num_facts (1) must be a list of integers"),
        ("seed: 0", ["--model", "[1]"], "model must be a mapping of its keys to valid values; --model.KEY sets"),
    ],
)
def test_a_wrong_type_gives_one_clear_sentence(read, text, options, message):
    """No message describes a value by Python's types."""
    with pytest.raises(InputError) as caught:
        read(text, *options)
    assert str(caught.value).startswith(message)
