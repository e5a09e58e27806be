"""Helpers that compute the gradients of one rollout with any method and compare them."""

import torch

from memformer import backpropagate
from memformer.training.engine import ReplayEngine
from memformer.training.replay import RolloutHooks
from tests.helpers import assert_close


def gradients_of(model):
    """Return copies of a model's gradients by the names of their parameters, without those that have none."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, rollout, memory):
    """Compute the gradients by plain back-propagation through time, without the package's training code."""
    model.zero_grad()
    memory = entering = memory.detach().clone().requires_grad_()
    nll, count = 0.0, 0
    for t in range(rollout.num_timesteps):
        if rollout.reset is not None:
            rows = [model.initial_memory(1)[0] if rollout.reset[t, b] else memory[b] for b in range(rollout.batch_size)]
            memory = torch.stack(rows)
        padding = None if rollout.input_padding is None else rollout.input_padding[t]
        hidden, memory = model.encode(rollout.inputs[t], memory=memory, padding_mask=padding)
        logits = model.decode(rollout.targets[t], hidden=hidden, hidden_padding_mask=padding)
        log_probabilities = logits.log_softmax(-1)
        for b in range(rollout.batch_size):
            for n in range(rollout.targets.shape[2]):
                if rollout.target_padding is None or not rollout.target_padding[t, b, n]:
                    nll = nll - log_probabilities[b, n, rollout.targets[t, b, n]]
                    count += 1
    (nll / count).backward()
    return (nll / count).detach(), count, memory.detach(), entering.grad, gradients_of(model)


def gradients(model, rollout, memory, method, *, readout_timesteps=1, **options):
    model.zero_grad()
    torch.manual_seed(5)
    result = backpropagate(model, rollout, memory=memory, method=method, readout_timesteps=readout_timesteps, **options)
    return result, gradients_of(model), torch.rand(1)


def by_engine(model, rollout, memory, *, engine=None, readout_timesteps=1, **options):
    model.zero_grad()
    torch.manual_seed(5)
    engine = engine or ReplayEngine(model, records=False)
    result = engine.backpropagate(rollout, memory=memory, readout_timesteps=readout_timesteps, **options)
    return result, gradients_of(model), torch.rand(1)


def assert_same_gradients(actual, expected):
    result, grads, _ = actual
    expected_result, expected_grads, _ = expected
    assert_close(result.loss, expected_result.loss)
    assert_close(result.memory, expected_result.memory)
    assert_close(result.memory_grad, expected_result.memory_grad)
    assert_close(result.memory_grad_norms, expected_result.memory_grad_norms)
    assert grads.keys() == expected_grads.keys()  # an optimizer decays a gradient of zero, but leaves None as it is
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad)


def assert_gradients(grads, expected):
    """Assert that gradients are the expected ones, and zero for parameters that have none in a loop written by hand."""
    assert grads.keys() >= expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected.get(name, torch.zeros_like(grad)))


def penalty(weight, shortfall=None):
    """Return hooks with constant weights of the auxiliary loss and of the writer's shortfall."""
    return RolloutHooks(
        auxiliary_weight=lambda loss: weight, shortfall_weight=None if shortfall is None else lambda loss: shortfall
    )
