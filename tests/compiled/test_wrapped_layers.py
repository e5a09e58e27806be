"""Layers in wrappers, such as those of torch.compile and of activation checkpointing."""

import copy

import pytest
import torch
from torch import nn

from memformer import Session, backpropagate
from tests.helpers import assert_close, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline, tokens


class Wrapper(nn.Module):
    """A wrapper that passes on what it does not have itself, as those of PyTorch do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPED = {
    "decoder layer": (tiny_model, lambda model: model.decoder.layers),
    "separate attention": (
        lambda: tiny_model(decoder_attention="separate", decoder_start_tokens=1),
        lambda model: model.decoder.layers,
    ),
    "compressive": (lambda: tiny_baseline("compressive"), lambda model: model.layers),
    "associative": (lambda: tiny_baseline("associative"), lambda model: model.memories),
}


# PyTorch's own compiler reads the gradients of hidden states.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("wrap", [Wrapper, lambda layer: torch.compile(layer, backend="eager")])
@pytest.mark.parametrize("name", WRAPPED)
def test_layers_can_be_wrapped(name, wrap):
    make, layers_of = WRAPPED[name]
    model = make()
    wrapped = copy.deepcopy(model)
    layers = layers_of(wrapped)
    layers[1] = wrap(layers[1])
    ids, rollout = tokens(1, 20)[0].tolist(), random_rollout(3, 2)
    assert_close(Session(wrapped).score(ids), Session(model).score(ids))
    results = [backpropagate(each, rollout) for each in (wrapped, model)]
    assert_close(results[0].loss, results[1].loss)
    for actual, expected in zip(wrapped.parameters(), model.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)
