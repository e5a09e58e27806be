import dataclasses
import json

import pytest

from memformer import InputError, MemformerConfig
from memformer.data import SourceConfig
from memformer.training.config import DataConfig, RunConfig, TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_updates", 0),
        ("num_updates", 10**9),
        ("num_lanes", 0),
        ("rollout_length", 0),
        ("rollouts_per_update", 0),
        ("readout_timesteps", 0),
        ("warmup_updates", -1),
        ("log_every", 0),
        ("evaluate_every", 0),
        ("evaluation_tokens", 0),
        ("sample_tokens", -1),
        ("save_every", 0),
        ("keep_checkpoints", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("final_learning_rate", 1.5),
        ("weight_decay", -0.1),
        ("max_gradient_norm", float("nan")),
        ("write_penalty", -0.1),
        ("write_penalty", float("inf")),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
    ],
)
def test_training_values_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=rf"training\.{field} \(.*\) must be"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_validation_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match=r"data\.validation_fraction \(.*\) must be above 0 and below 1"):
        DataConfig(validation_fraction=fraction)


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize(("kind", "name"), [(RunConfig, "seed"), (DataConfig, r"data\.seed")])
def test_seeds_out_of_range_are_refused(kind, name, seed):
    with pytest.raises(InputError, match=rf"^{name} \({seed}\) must be from 0"):
        kind(seed=seed)


@pytest.mark.parametrize("threads", [0, 2**31])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(InputError, match=rf"^threads \({threads}\) must be from 1 to 65536"):
        RunConfig(threads=threads)


@pytest.mark.parametrize("model", [{"num_slots": 0}, {"write_normalizer": "softmax"}])
def test_a_write_penalty_needs_slots_and_a_sparse_normalizer(model):
    training = TrainingConfig(write_penalty=0.1)
    RunConfig(model=MemformerConfig(write_normalizer="entmax15"), training=training)
    with pytest.raises(
        InputError, match=r"training\.write_penalty \(0\.1\) needs memory slots and a sparse write_normalizer; "
    ):
        RunConfig(model=MemformerConfig(**{"write_normalizer": "entmax15", **model}), training=training)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().num_updates = 3


def test_to_dict_contains_every_field():
    config = RunConfig(
        model=MemformerConfig(num_slots=3),
        data=DataConfig(train=SourceConfig(kind="text", path=["a", "b"])),
        training=TrainingConfig(betas=(0.5, 0.6)),
    )
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"]["num_slots"] == 3
    assert plain["data"]["train"]["path"] == ["a", "b"]
    assert plain["training"]["betas"] == [0.5, 0.6]
    for part, kind in (("model", MemformerConfig), ("data", DataConfig), ("training", TrainingConfig)):
        assert plain[part].keys() == {field.name for field in dataclasses.fields(kind)}


def test_sharding_with_a_learned_single_number_is_refused():
    training = TrainingConfig(sharding="weights")
    with pytest.raises(InputError, match=r"training\.sharding \('weights'\) needs model\.free_slot_bias 0, not 2\.0"):
        RunConfig(model=MemformerConfig(free_slot_bias=2.0), training=training)
    RunConfig(model=MemformerConfig(), training=training)
