"""Replay of the baselines equals back-propagation through time, for rollouts with any padding and resets."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, Rollout, backpropagate
from memformer.nn import AuxiliaryLoss
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, random_rollout
from tests.models.baselines import BASELINES, TYPES, tiny_baseline, used_memory
from tests.training.gradients import assert_gradients, assert_same_gradients, gradients, gradients_of, penalty

B, S = 3, SEGMENT_LENGTH


@st.composite
def rollouts(draw):
    """Draw rollouts whose rows have any number of targets, including none, and resets at any timestep."""
    num_timesteps = draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (num_timesteps, B, S)
    lengths = draw(st.lists(st.integers(0, S), min_size=num_timesteps * B, max_size=num_timesteps * B))
    target_padding = torch.arange(S) >= torch.tensor(lengths).view(num_timesteps, B, 1)
    return Rollout(
        inputs=torch.randint(0, VOCAB_SIZE + 1, shape, generator=generator),
        targets=torch.randint(0, VOCAB_SIZE, shape, generator=generator),
        reset=torch.rand(shape[:2], generator=generator) < 0.3,
        target_padding=target_padding,
    )


def by_hand(model, rollout, memory):
    """Compute the gradients by plain back-propagation through time, without the package's training code."""
    model.zero_grad()
    memory = entering = memory.detach().clone().requires_grad_()
    nll, count, reconstruction = torch.zeros(()).double(), 0, 0.0
    for t in range(rollout.num_timesteps):
        rows = [model.initial_memory(1)[0] if rollout.reset[t, b] else memory[b] for b in range(B)]
        before = rollout.inputs[t, :, -1:]  # the last input token; these rollouts have no input padding
        padding = rollout.target_padding[t]
        read = torch.cat([before, rollout.targets[t, :, :-1]], dim=1)
        auxiliary = AuxiliaryLoss() if model.auxiliary_weight else None
        hidden, memory = model.encode(read, memory=torch.stack(rows), padding_mask=padding, auxiliary=auxiliary)
        reconstruction = reconstruction + (auxiliary.total if auxiliary else 0.0)
        log_probabilities = model.embedding.logits(hidden).log_softmax(-1)
        for b in range(B):
            for n in range(S):
                if not padding[b, n]:
                    nll = nll - log_probabilities[b, n, rollout.targets[t, b, n]]
                    count += 1
    loss = nll / max(count, 1)
    total = loss + model.auxiliary_weight * reconstruction / max(count, 1)  # as many tokens are read as predicted
    if total.requires_grad:
        total.backward()
    return loss.detach(), memory.detach(), entering.grad, gradients_of(model)


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=6)
@given(rollout=rollouts(), readout_timesteps=st.sampled_from([1, 2]))
def test_replay_and_checkpoint_equal_bptt(name, rollout, readout_timesteps):
    model = tiny_baseline(name, dropout=0.2)
    memory = used_memory(model.eval(), B)
    model.train()
    expected, *runs = [
        gradients(model, rollout, memory, method, readout_timesteps=readout_timesteps)
        for method in ("bptt", "checkpoint", "replay")
    ]
    for run in runs:
        assert_same_gradients(run, expected)


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=5)
@given(rollout=rollouts())
def test_replay_equals_a_loop_written_by_hand(name, rollout):
    model = tiny_baseline(name)
    memory = used_memory(model, B)
    loss, last, memory_grad, expected = by_hand(model, rollout, memory)
    result, grads, _ = gradients(model, rollout, memory, "replay")
    assert_close(result.loss, loss)
    assert_close(result.memory, last)
    assert_close(result.memory_grad, torch.zeros_like(memory) if memory_grad is None else memory_grad)
    assert_gradients(grads, expected)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "compressive"])
def test_an_auxiliary_loss_is_refused_for_a_model_without_one(name):
    model = tiny_baseline(name)
    with pytest.raises(InputError, match=f"an? {type(model).__name__} has no auxiliary loss"):
        backpropagate(model, random_rollout(2, B), hooks=penalty(1.0))
    with pytest.raises(InputError, match=f"an? {type(model).__name__} has no auxiliary loss"):
        model.encode(random_rollout(1, B).inputs[0], auxiliary=AuxiliaryLoss())


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_the_reconstruction_loss_does_not_need_targets(method):
    """The compression is trained on what is read, also where nothing is to be predicted."""
    model = tiny_baseline("compressive")
    memory, drawn = used_memory(model, B), random_rollout(3, B)
    rollout = Rollout(inputs=drawn.inputs, targets=drawn.targets[..., :1], targets_are_answers=True)
    everything = torch.ones(rollout.targets.shape, dtype=torch.bool)
    unpredicted = dataclasses.replace(rollout, target_padding=everything)
    _, predicted, _ = gradients(model, rollout, memory, method)
    _, alone, _ = gradients(model, unpredicted, memory, method)
    compression = [name for name in predicted if "compression" in name]
    assert compression
    for name in compression:
        assert predicted[name].norm() > 0
        assert_close(alone[name], predicted[name])
    assert all(grad.norm() == 0 for name, grad in alone.items() if name not in compression)
