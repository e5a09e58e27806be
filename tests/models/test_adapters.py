"""Layers are called, not read: adapters, hooks, pruning and conversions of layers work in every model."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from memformer import InputError, Session, backpropagate
from memformer.nn import AuxiliaryLoss
from memformer.training.engine import ReplayEngine
from tests.helpers import VARIANTS, assert_close, random_rollout, tiny_model
from tests.models.baselines import BASELINES, TYPES, tiny_baseline, tokens
from tests.training.gradients import assert_same_gradients, gradients

# An adaptive softmax is a table of word vectors: its rows are looked up, so an adapter around it has no effect on them.
MODELS = {
    **{name: lambda o=options: tiny_model(**o) for name, options in VARIANTS.items() if "adaptive" not in name},
    **{name: lambda n=name: tiny_baseline(n) for name in BASELINES if "adaptive" not in name},
}
# One model of each way in which the embedding is read.
EMBEDDINGS = (
    "default",
    "separate attention",
    "joint attention, starting from [BOS]",
    "joint attention, starting from the last token",
    "position embedding",
    "content addressing",
    *TYPES,
)


class LowRankAdapter(nn.Module):
    """A linear layer plus a product of two narrow matrices (LoRA), without a `weight` of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(0.3 * torch.randn(2, layer.in_features).to(layer.weight))
        self.up = nn.Parameter(0.3 * torch.randn(layer.out_features, 2).to(layer.weight))

    def forward(self, x):
        return self.layer(x) + x @ self.down.mT @ self.up.mT


def linear_layers(model):
    """Return the parent and the name of every linear layer."""
    return [
        (parent, name)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if isinstance(child, nn.Linear)
    ]


def adapted_and_merged(model):
    torch.manual_seed(3)
    merged = copy.deepcopy(model)
    for (parent, name), (other, _) in zip(linear_layers(model), linear_layers(merged), strict=True):
        adapter = LowRankAdapter(getattr(parent, name))
        with torch.no_grad():
            getattr(other, name).weight += adapter.up @ adapter.down
        setattr(parent, name, adapter)
    return model, merged


@pytest.mark.parametrize("name", MODELS)
def test_adapters_around_every_layer_equal_merged_weights(name):
    adapted, merged = adapted_and_merged(MODELS[name]())
    rollout = random_rollout(3, 2)
    actual = gradients(adapted, rollout, None, "replay")
    expected = gradients(merged, rollout, None, "replay")
    assert_close(actual[0].loss, expected[0].loss)
    assert_close(actual[0].memory, expected[0].memory)
    assert_same_gradients(actual, gradients(adapted, rollout, None, "bptt"))
    ids = tokens(1, 15)
    sessions = [Session(model) for model in (adapted, merged)]
    for session in sessions:
        session.feed(ids[0])
    assert_close(sessions[0].next_token_logits(), sessions[1].next_token_logits())


@pytest.mark.parametrize("name", ["compressive", "compressive, uneven"])
def test_an_adapter_takes_part_in_the_reconstruction_loss(name):
    adapted, merged = adapted_and_merged(tiny_baseline(name))
    totals = []
    for model in (adapted, merged):
        memory, auxiliary = model.initial_memory(2), AuxiliaryLoss()
        for segment in tokens(2, 24).split(6, dim=1):
            _, memory = model.encode(segment, memory=memory, auxiliary=auxiliary)
        totals.append(auxiliary.total)
    assert totals[1] > 0
    assert_close(totals[0], totals[1])


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_every_layer_are_called(name):
    model = MODELS[name]()
    called = set()
    for parent, child in linear_layers(model):
        layer = getattr(parent, child)
        layer.register_forward_hook(lambda module, inputs, output: called.add(module))
    auxiliary = AuxiliaryLoss() if model.auxiliary_weight else None
    memory = model.initial_memory(2)
    for segment in tokens(2, 24).split(6, dim=1):
        hidden, memory = model.encode(segment, memory=memory, auxiliary=auxiliary)
    model.decode(segment, hidden=hidden)
    assert called == {getattr(parent, child) for parent, child in linear_layers(model)}


@pytest.mark.parametrize("change", ["pruned", "parametrized"])
def test_pruned_and_parametrized_layers_are_replayed(change):
    model = tiny_model()
    for parent, name in linear_layers(model):
        if change == "pruned":
            prune.l1_unstructured(getattr(parent, name), "weight", amount=0.5)
        else:
            parametrizations.weight_norm(getattr(parent, name))
    rollout = random_rollout(3, 2)
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(gradients(model, rollout, None, "replay"), expected)


@pytest.mark.parametrize("change", ["pruned", "weight norm", "added"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_whose_weights_a_hook_computes_are_replayed(name, change):
    model = MODELS[name]()
    embedding = model.embedding
    if change == "pruned":
        prune.random_unstructured(embedding, "weight", amount=0.5)
    elif change == "weight norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(embedding, "weight")
    else:
        base = nn.Parameter(embedding.weight.detach().clone())
        difference = nn.Parameter(0.1 * torch.randn_like(base))
        del embedding.weight
        embedding.base, embedding.difference, embedding.weight = base, difference, base + difference

        def add(module, inputs):
            module.weight = module.base + module.difference

        embedding.register_forward_pre_hook(add)
    rollout = random_rollout(3, 2)
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(gradients(model, rollout, None, "replay"), expected)
    assert_same_gradients(gradients(model, rollout, None, "checkpoint"), expected)


def test_a_model_in_half_precision_keeps_its_memory_in_float32():
    model = tiny_model().to(torch.bfloat16)
    hidden, memory = model.encode(tokens(2, 6))
    assert hidden.dtype == torch.bfloat16
    assert memory.dtype == torch.float32
    # The writer computes in float32 with the bfloat16 weights, so only the tokens' hidden states are rounded.
    exact = tiny_model().to(torch.bfloat16).float()
    _, expected = exact.encode(tokens(2, 6))
    assert_close(memory, expected, relative=0.05)


@pytest.mark.parametrize("method", ["replay", "checkpoint", "engine"])
@pytest.mark.parametrize("normalize", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_buffers_that_reading_changes_are_refused_by_methods_that_read_twice(normalize, method):
    model, rollout = tiny_model().train(), random_rollout(3, 2)
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        normalize(layer)
    backpropagate(model, rollout, method="bptt")
    model.zero_grad()
    run = ReplayEngine(model, records=False).backpropagate
    with pytest.raises(InputError, match=r"the buffer \S+ changes when the model reads.*use method 'bptt'"):
        run(rollout) if method == "engine" else backpropagate(model, rollout, method=method)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.eval()
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(gradients(model, rollout, None, "replay"), expected)


class KeepsMean(nn.Module):
    """A layer that adds the mean of what it has read before, kept in a buffer."""

    def __init__(self, layer, rebinds):
        super().__init__()
        self.layer, self.rebinds = layer, rebinds
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        mean = 0.5 * self.mean + x.detach().mean()
        if self.rebinds:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return self.layer(x) + mean


@pytest.mark.parametrize("rebinds", [False, True])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("readout_timesteps", [1, 3])
def test_buffers_of_any_part_are_watched(part, rebinds, readout_timesteps):
    model = tiny_model()
    layer = getattr(model, part).layers[0].feed_forward
    layer.expand = KeepsMean(layer.expand, rebinds)
    options = {"readout_timesteps": readout_timesteps}
    for method in ["checkpoint", "replay"] if part == "encoder" else ["checkpoint"]:
        with pytest.raises(InputError, match=r"the buffer \S+\.mean changes when the model reads"):
            backpropagate(model, random_rollout(3, 2), method=method, **options)
        assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_buffer_of_the_model_itself_is_named():
    model = tiny_model()
    model.register_buffer("count", torch.zeros(()))

    def count(*_):
        model.count.add_(1)

    model.encoder.register_forward_pre_hook(count)
    with pytest.raises(InputError, match="the buffer count changes when the model reads"):
        backpropagate(model, random_rollout(3, 2))
