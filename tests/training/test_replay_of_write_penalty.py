"""The write penalty, the auxiliary loss of a Memformer, has the same gradient with every method of back-propagation."""

import dataclasses

import pytest
import torch

from memformer import InputError, Rollout, backpropagate
from memformer.nn import AuxiliaryLoss
from memformer.training.replay import RolloutHooks
from tests.helpers import assert_close, random_rollout, tiny_model
from tests.training.gradients import assert_same_gradients, gradients, gradients_of, penalty


@pytest.mark.parametrize("knows_filler", [False, True])
@pytest.mark.parametrize("competition", [False, True])
def test_with_a_write_penalty_replay_and_checkpoint_equal_bptt(competition, knows_filler):
    model = tiny_model(dropout=0.2, write_normalizer="entmax15", write_competition=competition)
    memory = model.initial_memory(3).detach() + 0.1 * torch.randn_like(model.initial_memory(3))
    rollout = random_rollout(5, 3, resets=True, padding=True)
    if knows_filler:
        rollout = dataclasses.replace(rollout, is_filler=torch.arange(15).view(5, 3) % 2 == 0)
    free, *runs = [
        gradients(
            model, rollout, memory, method, readout_timesteps=2, hooks=penalty(weight, 2 * weight), gradient_scale=0.3
        )
        for method, weight in (("bptt", 0.0), ("bptt", 0.5), ("checkpoint", 0.5), ("replay", 0.5))
    ]
    for run in runs[1:]:
        assert_same_gradients(run, runs[0])
    assert_close(runs[0][0].loss, free[0].loss)
    assert (runs[0][1]["memory_writer.key.weight"] - free[1]["memory_writer.key.weight"]).norm() > 1e-3


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
@pytest.mark.parametrize("knows_filler", [False, True])
def test_the_auxiliary_loss_is_its_weight_times_the_mean_over_the_tokens_read(method, knows_filler):
    model = tiny_model(write_normalizer="entmax15")
    memory = model.initial_memory(3).detach()
    rollout = random_rollout(4, 3, resets=True, padding=True)
    filler = torch.arange(12).view(4, 3) % 5 == 0 if knows_filler else [None] * 4
    if knows_filler:
        rollout = dataclasses.replace(rollout, is_filler=filler)
    model.zero_grad()
    state, total = memory, 0.0
    for t in range(rollout.num_timesteps):
        auxiliary = AuxiliaryLoss(is_filler=filler[t])
        state = model.reset_memory(state, rollout.reset[t])
        padding = rollout.input_padding[t]
        _, state = model.encode(rollout.inputs[t], memory=state, padding_mask=padding, auxiliary=auxiliary)
        total = total + auxiliary.total + 3 * auxiliary.shortfall
    (0.7 * total / (~rollout.input_padding).sum()).backward()
    expected = gradients_of(model)
    _, free, _ = gradients(model, rollout, memory, method)
    _, penalized, _ = gradients(model, rollout, memory, method, hooks=penalty(0.7, 2.1))
    assert free.keys() | expected.keys() == penalized.keys()
    for name, grad in penalized.items():
        assert_close(grad, free.get(name, 0) + expected.get(name, 0))


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_the_weight_of_the_auxiliary_loss_may_depend_on_the_loss(method):
    model = tiny_model(write_normalizer="entmax15")
    rollout = random_rollout(3, 2)
    memory = model.initial_memory(2)
    free = gradients(model, rollout, memory, method)
    always = gradients(model, rollout, memory, method, hooks=penalty(1.0))
    loss = float(free[0].loss)
    seen = []

    def below(limit):
        return RolloutHooks(auxiliary_weight=lambda loss: seen.append(loss) or float(loss < limit))

    assert_same_gradients(gradients(model, rollout, memory, method, hooks=below(loss * 1.01)), always)
    assert_same_gradients(gradients(model, rollout, memory, method, hooks=below(loss * 0.99)), free)
    assert seen == pytest.approx([loss, loss], rel=1e-12)
    assert (always[1]["memory_writer.key.weight"] - free[1]["memory_writer.key.weight"]).norm() > 1e-3


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_a_writer_that_has_stopped_writing_learns_to_write_again_by_its_shortfall(method):
    """Weights of exactly 0 have no gradient, and neither has the penalty of tokens that are clearly not written."""
    model = tiny_model(write_normalizer="entmax15", free_slot_bias=1.0)
    with torch.no_grad():
        model.memory_writer.free_slot_bias.fill_(-1000.0)  # a free slot keeps what it is, whatever it reads
    rollout, memory = random_rollout(3, 2, padding=True), model.initial_memory(2).detach()
    names = [f"memory_writer.{name}" for name in ("query.weight", "key.weight", "free_slot_bias")]
    for hooks, is_learned in ((penalty(1.0), False), (penalty(0.0, 1.0), True), (penalty(1.0, 0.0), False)):
        _, grads, _ = gradients(model, rollout, memory, method, hooks=hooks)
        assert [bool(grads[name].norm() > 0) for name in names] == [is_learned] * len(names)
        assert (grads[names[-1]] < 0) == is_learned  # free slots take tokens more easily again


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_the_auxiliary_loss_is_zero_without_targets(method):
    model = tiny_model(write_normalizer="entmax15")
    rollout = random_rollout(3, 2)
    nothing = torch.ones(rollout.targets.shape, dtype=torch.bool)
    unpredicted = Rollout(inputs=rollout.inputs, targets=rollout.targets, target_padding=nothing)
    _, grads, _ = gradients(model, unpredicted, model.initial_memory(2), method, hooks=penalty(1.0))
    assert all(grad.norm() == 0 for grad in grads.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, r"num_slots is 0; a write penalty needs at least 1 memory slot"),
        ({}, r"write_normalizer \('softmax'\) writes every token"),
    ],
)
def test_a_model_whose_writes_cannot_be_penalized_is_refused_before_any_gradient(options, message):
    model = tiny_model(**options)
    with pytest.raises(InputError, match=message):
        backpropagate(model, random_rollout(2, 2), hooks=penalty(1.0))
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match="shortfall_weight is given without hooks.auxiliary_weight"):
        backpropagate(model, random_rollout(2, 2), hooks=RolloutHooks(shortfall_weight=lambda loss: 1.0))
