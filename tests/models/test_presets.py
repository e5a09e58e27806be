"""Presets: named groups of options, in a file, on the command line and in Python."""

import dataclasses
from typing import get_args

import pytest
import yaml

from memformer import InputError, MemformerConfig
from memformer.cli.run_config import parse_run_config
from memformer.models.presets import Preset, preset_fields
from tests.helpers import VARIANTS

RECALL = preset_fields("recall")


@pytest.fixture
def parse(tmp_path):
    def parse(model, *options, model_type="memformer"):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"model_type": model_type, "model": model}))
        return parse_run_config([str(file), *options])[0].model

    return parse


def test_the_default_preset_is_the_default():
    assert MemformerConfig.from_preset("default") == MemformerConfig()


def test_the_paper_preset_equals_the_variant_used_in_tests():
    assert MemformerConfig.from_preset("paper") == MemformerConfig(**VARIANTS["paper"])


def test_every_preset_sets_the_same_keys():
    assert {frozenset(preset_fields(name)) for name in get_args(Preset)} == {frozenset(RECALL)}


def test_keys_in_a_file_override_its_preset(parse):
    model = parse({"preset": "recall", "free_slot_bias": 2.0, "num_slots": 8})
    assert model == MemformerConfig.from_preset("recall", free_slot_bias=2.0, num_slots=8)


def test_a_preset_on_the_command_line_replaces_the_files_keys(parse):
    given = {"preset": "paper", "write_normalizer": "sparsemax", "d_model": 64}
    model = parse(given, "--model.preset", "recall")
    assert model == MemformerConfig.from_preset("recall", d_model=64)
    assert parse(given, "--model.preset=recall", "--model.free_slot_bias", "1.0").free_slot_bias == 1.0
    assert parse({**RECALL, "d_model": 64}, "--model.preset=default") == MemformerConfig(d_model=64)


def test_a_preset_leaves_other_keys_alone(parse):
    model = parse({"convolution_kernel": 3, "preset": "recall"})
    others = {field.name for field in dataclasses.fields(model)} - RECALL.keys() - {"convolution_kernel"}
    assert all(getattr(model, name) == getattr(MemformerConfig(), name) for name in others)


def test_mistakes(parse):
    with pytest.raises(
        InputError, match=r"model.preset \('recal'\) must be one of default, paper, recall in .*run.yaml"
    ):
        parse({"preset": "recal"})
    with pytest.raises(InputError, match=r"preset \('best'\) must be one of"):
        MemformerConfig.from_preset("best")
    with pytest.raises(InputError, match=r"model.preset \('papper'\) must be one of .* in --model.preset"):
        parse({}, "--model.preset", "papper")
    with pytest.raises(InputError, match=r"model \(None\) in .* must be a mapping"):
        parse(None, "--model.preset", "paper")
    with pytest.raises(InputError, match="model.preset needs model_type 'memformer', not 'lstm'"):
        parse({"preset": "recall"}, model_type="lstm")
