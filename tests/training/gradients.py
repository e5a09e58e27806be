"""Helpers that compute the gradients of one rollout with any method and compare them."""

import torch

from memformer import backpropagate
from memformer.training.replay import RolloutHooks
from tests.helpers import assert_close


def gradients(model, rollout, memory, method, *, readout_timesteps=1, **options):
    model.zero_grad()
    torch.manual_seed(5)
    result = backpropagate(model, rollout, memory=memory, method=method, readout_timesteps=readout_timesteps, **options)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result, grads, torch.rand(1)


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


def penalty(weight, shortfall=None):
    """Return hooks with constant weights of the auxiliary loss and of the writer's shortfall."""
    return RolloutHooks(
        auxiliary_weight=lambda loss: weight, shortfall_weight=None if shortfall is None else lambda loss: shortfall
    )
