"""Dropout acts at each of its places, in training only."""

from collections import Counter

import pytest
import torch
from torch import nn

from memformer.nn.distances import DistanceFrame
from memformer.nn.positions import Frame, RelativeFrame
from tests.helpers import tiny_model
from tests.models.baselines import tiny_baseline, tokens
from tests.models.classifiers import tiny_classifier

# Calls of the dropout of each layer in one timestep. With one attention the decoder's first layer also reads the start
# tokens, of which the last layer needs no more than keys and values.
MEMFORMERS = {
    "default": ({}, {"encoder.layers.0": 3, "encoder.layers.1": 3, "decoder.layers.0": 4, "decoder.layers.1": 2}),
    "separate": (
        {"decoder_attention": "separate", "decoder_start_tokens": 0},
        {"encoder.layers.0": 3, "encoder.layers.1": 3, "decoder.layers.0": 3, "decoder.layers.1": 3},
    ),
    "without memory": (
        {"num_slots": 0},
        {"encoder.layers.0": 2, "encoder.layers.1": 2, "decoder.layers.0": 4, "decoder.layers.1": 2},
    ),
}
LAYERS = {f"layers.{index}": 2 for index in range(3)}


def calls_of(model):
    """Return a count of the calls of each dropout that is still to come."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.update([name.removesuffix(".dropout")]))
    return calls


def run(model):
    hidden, _ = model.encode(tokens(2, 6), memory=model.initial_memory(2))
    model.decode(tokens(2, 6), hidden=hidden)


@pytest.mark.parametrize("name", MEMFORMERS)
def test_every_dropout_of_a_memformer_is_called(name):
    options, expected = MEMFORMERS[name]
    model = tiny_model(dropout=0.5, **options)
    calls = calls_of(model)
    run(model)
    assert calls == {**expected, "embedding_dropout": 2}  # encoder and decoder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lstm", {"dropout": 2}),  # between its three layers
        ("transformer-xl", LAYERS),
        ("compressive", LAYERS),
        ("recurrent memory", LAYERS),
        ("associative", LAYERS),
    ],
)
def test_every_dropout_of_a_baseline_is_called(name, expected):
    model = tiny_baseline(name, dropout=0.5, num_layers=3)
    calls = calls_of(model)
    run(model)
    assert calls == {**expected, "embedding_dropout": 1}


def test_every_dropout_of_a_classifier_is_called():
    model = tiny_classifier(dropout=0.5)
    calls = calls_of(model)
    hidden, _ = model.encode(tokens(2, 6), memory=model.initial_memory(2))
    model.decode(torch.zeros(2, 1, dtype=torch.int64), hidden=hidden)
    assert calls == {"encoder.layers.0": 3, "encoder.layers.1": 3, "embedding_dropout": 1, "head_dropout": 1}


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: tiny_model(**options),
        lambda **options: tiny_model(decoder_attention="separate", decoder_start_tokens=0, **options),
        lambda **options: tiny_model(positions="relative", **options),
        lambda **options: tiny_baseline("transformer-xl", **options),
        lambda **options: tiny_baseline("recurrent memory", **options),
    ],
)
def test_the_weights_of_every_attention_have_dropout_in_training_only(build, monkeypatch):
    found = []
    for frame in (Frame, RelativeFrame, DistanceFrame):
        attend = frame.attend

        def recorded(self, *arguments, attend=attend, dropout=0.0, **options):
            found.append(dropout)
            return attend(self, *arguments, dropout=dropout, **options)

        monkeypatch.setattr(frame, "attend", recorded)
    model = build(attention_dropout=0.5)
    for is_training, expected in ((True, 0.5), (False, 0.0)):
        model.train(is_training)
        run(model)
        assert set(found) == {expected}
        found.clear()
