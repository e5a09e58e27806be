"""The modules inside a model are found again after every change of them, and do not keep the model."""

import gc
import weakref

import pytest
from torch import nn

from memformer.utils.modules import modules_inside


def make_model():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()))


def replace(model):
    model[1][0] = nn.Linear(2, 2)


def remove(model):
    del model[1][1]


def remove_by_none(model):
    model[1]._modules["1"] = None


@pytest.mark.parametrize("change", [lambda model: model.append(nn.GELU()), replace, remove, remove_by_none])
def test_the_modules_are_the_same_tuple_until_they_change(change):
    model = make_model()
    before = modules_inside(model)
    assert before == tuple(model.modules())[1:]
    assert modules_inside(model) is before
    change(model)
    assert modules_inside(model) == tuple(model.modules())[1:] != before


def test_models_have_their_own_modules_and_are_freed():
    model, other = make_model(), make_model()
    assert set(modules_inside(model)).isdisjoint(modules_inside(other))
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None
