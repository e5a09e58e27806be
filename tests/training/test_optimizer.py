import copy
import itertools
import math

import pytest
import torch
from torch import nn

from memformer import MemformerConfig
from memformer.data import RecallConfig, SourceConfig
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.optimizer import clip_gradients, learning_rate_at, make_optimizer, writer_weights
from memformer.training.replay import backpropagate
from tests.helpers import assert_close, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline


def groups_by_name(model, config):
    optimizer = make_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(variant, optimizer):
    model = tiny_model(**variant)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=optimizer))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_that_multiply_activations_are_decayed(variant, optimizer):
    decay = groups_by_name(tiny_model(**variant), TrainingConfig(weight_decay=0.25, optimizer=optimizer))
    assert set(decay.values()) == {0.0, 0.25}
    for name, value in decay.items():
        excluded = any(part in name for part in ("embedding", "norm", "bias")) or "slot" in name
        assert (value == 0.0) == excluded, name


def test_the_matrices_of_an_lstm_are_decayed_and_its_biases_are_not():
    decay = groups_by_name(tiny_baseline("lstm"), TrainingConfig(weight_decay=0.25))
    assert {name for name, value in decay.items() if value} == {
        f"layers.{layer}.weight_{kind}_l0" for kind in ("ih", "hh") for layer in (0, 1)
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_betas_reach_the_optimizer(optimizer):
    made = make_optimizer(tiny_model(), TrainingConfig(optimizer=optimizer, betas=(0.5, 0.6)))
    found = {group["betas"] for group in made.param_groups if "betas" in group}
    assert found == {(0.5, 0.6)}


def test_a_largest_norm_of_zero_clips_nothing():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(layer, 0.0) == 5
    assert layer.weight.grad.tolist() == [[3, 4]]
    assert clip_gradients(layer, 1.0) == 5
    assert layer.weight.grad.norm().item() == pytest.approx(1)


def test_warm_up_is_linear():
    config = TrainingConfig(learning_rate=0.5, warmup_updates=4, num_updates=20)
    rates = [learning_rate_at(update, config) for update in range(5)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_decays_from_the_peak_to_the_final_rate(warmup):
    config = TrainingConfig(learning_rate=0.5, final_learning_rate=0.2, warmup_updates=warmup, num_updates=20)
    rates = [learning_rate_at(update, config) for update in range(warmup, 21)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[len(rates) // 2] == pytest.approx(0.5 * (1 + 0.2) / 2)
    assert rates[-1] == pytest.approx(0.1)
    assert all(before > after for before, after in itertools.pairwise(rates))
    assert learning_rate_at(10_000, config) == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run():
    config = TrainingConfig(learning_rate=1.0, warmup_updates=10, num_updates=5)
    assert [learning_rate_at(update, config) for update in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert math.isfinite(learning_rate_at(10, config))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_only(optimizer):
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, optimizer=optimizer)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decay = groups_by_name(model, config)
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] * (1 - 0.1 * decay[name]))


def test_gradients_of_rollouts_weighted_by_tokens_equal_the_gradient_of_all_tokens():
    # Two rollouts of separate documents with different numbers of tokens, compared with both as rows of one rollout.
    model = tiny_model()
    first = random_rollout(2, 2, padding=True, seed=3)
    second = random_rollout(2, 2, seed=4)
    counts = [rollout.count_target_tokens() for rollout in (first, second)]
    assert counts[0] != counts[1]
    for rollout, count in zip((first, second), counts, strict=True):
        backpropagate(model, rollout, gradient_scale=count / sum(counts))
    accumulated = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    side_by_side = type(first)(
        inputs=torch.cat([first.inputs, second.inputs], dim=1),
        targets=torch.cat([first.targets, second.targets], dim=1),
        input_padding=torch.cat([first.input_padding, torch.zeros_like(first.input_padding)], dim=1),
        target_padding=torch.cat([first.target_padding, torch.zeros_like(first.target_padding)], dim=1),
    )
    backpropagate(model, side_by_side)
    for parameter, expected in zip(model.parameters(), accumulated, strict=True):
        assert_close(parameter.grad, expected)


@pytest.mark.parametrize(
    ("model", "penalty", "recall", "num_processes", "has_shortfall"),
    [
        ({"write_normalizer": "entmax15"}, 0.0, True, 1, True),
        ({"write_normalizer": "sparsemax"}, 0.5, True, 1, True),
        ({"write_normalizer": "entmax15"}, 0.5, False, 1, False),
        ({"write_normalizer": "entmax15"}, 0.0, True, 2, False),
        ({"num_slots": 0}, 0.0, True, 1, False),
        ({}, 0.0, True, 1, False),
    ],
)
def test_a_sparse_writer_has_a_shortfall_while_a_recall_task_is_not_learned(
    model, penalty, recall, num_processes, has_shortfall
):
    data = DataConfig(recall=RecallConfig(task="fact")) if recall else DataConfig(train=SourceConfig(path="x"))
    config = RunConfig(
        folder="x",
        model=MemformerConfig(**model),
        data=data,
        training=TrainingConfig(num_updates=10, write_penalty=penalty),
    )
    weights = writer_weights(5, config, num_processes=num_processes)
    assert ("auxiliary_weight" in weights) == (has_shortfall or penalty > 0)
    assert ("shortfall_weight" in weights) == has_shortfall
    if has_shortfall:
        assert (weights["shortfall_weight"](0.99), weights["shortfall_weight"](1.0)) == (0.0, 1.0)
    if weights:
        assert weights["auxiliary_weight"](0.05) == pytest.approx(penalty / 2)
        assert weights["auxiliary_weight"](0.1) == 0.0


def _step(name, model):
    """Return each parameter's gradient, drawn at random, and its change by one step."""
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=0.1, weight_decay=0.0, optimizer=name))
    generator = torch.Generator().manual_seed(0)
    before = {}
    for key, parameter in model.named_parameters():
        before[key] = parameter.detach().clone()
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.05  # as the training loop sets it before each update
    optimizer.step()
    return {key: (parameter.grad, parameter.detach() - before[key]) for key, parameter in model.named_parameters()}


def test_muon_changes_matrices_by_orthogonal_steps_and_the_rest_as_adamw(variant):
    by_adamw, by_muon = _step("adamw", tiny_model(**variant)), _step("muon", tiny_model(**variant))
    num_matrices = 0
    for key, (gradient, change) in by_muon.items():
        _, change_by_adamw = by_adamw[key]
        if change.ndim != 2 or any(part in key for part in ("embedding", "slot")):
            assert_close(change, change_by_adamw)
            continue
        num_matrices += 1
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        # Muon approximates the orthogonal matrix that is nearest to the gradient.
        assert torch.cosine_similarity(change.flatten(), -(left @ right).flatten(), dim=0) > 0.95, key
        # The first step of AdamW changes each weight by the learning rate; Muon's has a fifth of its root mean square.
        assert 0.1 < change.norm() / change_by_adamw.norm() < 0.3, key
    assert num_matrices > 5


def test_a_copy_of_muon_goes_on_as_the_original():
    model = tiny_model()
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=0.1, optimizer="muon"))

    def step(optimizer):
        """Make a step with a closure that sets gradients; return the changed weights."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def closure():
            optimizer.zero_grad()
            loss = sum(parameter.square().sum() for parameter in parameters)
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) > 0
        return [parameter.detach().clone() for parameter in parameters]

    first = step(optimizer)
    other = copy.deepcopy(optimizer)
    assert [torch.equal(*pair) for pair in zip(step(optimizer), step(other), strict=True)] == [True] * len(first)
