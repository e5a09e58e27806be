"""Modules that a user has changed: computed weights, hooks, adapters, shared and quantized layers, own readouts."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from memformer import LSTM, InputError, InputTypeError, Memformer, Session, backpropagate
from memformer.training.engine import ReplayEngine
from tests.helpers import assert_close, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline, tokens
from tests.training.gradients import assert_same_gradients, gradients


def adaptive(layer):
    model = tiny_model(d_model=16, adaptive_cutoffs=(4, 8))
    tail = model.embedding.softmax.tail[0]
    return model, {"head": model.embedding.softmax.head, "projection": tail[0], "narrow": tail[1]}[layer], "weight"


def forgetting(**options):
    model = tiny_model(**options)
    return model, model.memory_normalization, "slot_bias"


def memory_tokens(name):
    model = tiny_baseline(name)
    return model, model, "memory_tokens"


COMPUTED = {
    "adaptive head": lambda: adaptive("head"),
    "adaptive projection": lambda: adaptive("projection"),
    "adaptive narrow vectors": lambda: adaptive("narrow"),
    "forgetting vectors": forgetting,
    "log speeds": lambda: forgetting(log_forgetting_speeds=True),
    "read tokens": lambda: memory_tokens("recurrent memory"),
    "write tokens": lambda: memory_tokens("associative"),
}


@pytest.mark.parametrize("compute", ["pruning", "weight norm"])
@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_a_hook_computes_are_current_wherever_they_are_read(name, compute):
    model, module, weight = COMPUTED[name]()
    if compute == "pruning":
        prune.random_unstructured(module, weight, amount=0.3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(module, weight)
    ids = tokens(1, 20)[0].tolist()
    Session(model).score(ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    first, second = Session(model).score(ids), Session(model).score(ids)
    assert torch.equal(first, second)
    rollout = random_rollout(3, 2)
    expected = gradients(model, rollout, None, "bptt")
    for method in ("replay", "checkpoint"):
        assert_same_gradients(gradients(model, rollout, None, method), expected)


HOOKED = {
    "default": tiny_model,
    "transformer-xl": lambda: tiny_baseline("transformer-xl"),
    "compressive": lambda: tiny_baseline("compressive"),
}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("register", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_backward_hooks_see_the_keys_and_values_of_the_past(name, register):
    """They are a part of a layer's output that is computed by itself, unless something waits for the layer's call."""

    def run(forward_hook):
        model, calls = HOOKED[name](), []
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight.shape[0] == 3 * layer.weight.shape[1]:
                getattr(layer, register)(lambda module, *gradients: calls.append(module))
                if forward_hook:
                    layer.register_forward_hook(lambda module, inputs, output: None)
        result = gradients(model, random_rollout(3, 2), None, "bptt")
        return len(calls), result

    plain, forced = run(False), run(True)
    assert plain[0] == forced[0] > 0
    assert_same_gradients(plain[1], forced[1])


def test_a_session_of_a_model_with_shared_layers_can_be_continued(tmp_path):
    model = tiny_model()
    model.encoder.layers[1] = model.encoder.layers[0]
    session = Session(model)
    session.feed(tokens(1, 20)[0].tolist())
    session.save(tmp_path / "state")
    model.save_pretrained(tmp_path / "model")
    loaded = Memformer.from_pretrained(tmp_path / "model")
    assert_close(
        Session.load(tmp_path / "state", model=loaded).next_token_logits(),
        session.next_token_logits().float(),
        relative=1e-5,
    )


class LowRank(nn.Module):
    """An adapter in float32 around a layer in half precision."""

    def __init__(self, layer):
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(2, layer.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(layer.out_features, 2))
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + (x.float() @ self.down.mT @ self.up.mT).to(self.layer.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [LowRank, parametrizations.spectral_norm])
def test_layers_of_the_memory_writer_in_half_precision_can_be_changed(change, dtype):
    """The writer computes in float32, whatever the dtypes of a layer's weights and buffers are."""
    torch.manual_seed(3)
    model = tiny_model().to(dtype)
    model.memory_writer.value = change(model.memory_writer.value)
    model.eval()
    exact = copy.deepcopy(model).float()
    sessions = [Session(each) for each in (model, exact)]
    for session in sessions:
        session.feed(tokens(1, 20)[0].tolist())
    assert sessions[0].memory.dtype == torch.float32
    assert_close(sessions[0].memory, sessions[1].memory, relative=0.05)


class OwnReadout(LSTM):
    """An LSTM whose logits have a bias."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.linspace(-2, 2, config.vocab_size))

    def decode(self, targets, *, hidden, hidden_padding_mask=None):
        return super().decode(targets, hidden=hidden, hidden_padding_mask=hidden_padding_mask) + self.bias


def test_a_readout_of_ones_own_decides_the_likelihood_too():
    model = OwnReadout(tiny_baseline("lstm").config).double()
    ids = tokens(1, 20)[0]
    logits = Session(model).token_logits(ids)
    assert_close(Session(model).score(ids), F.cross_entropy(logits, ids, reduction="none"))
    rollout = random_rollout(3, 2, padding=True)
    actual = gradients(model, rollout, None, "replay")
    assert_same_gradients(actual, gradients(model, rollout, None, "bptt"))
    assert actual[1]["bias"].norm() > 0


class OtherReadout(Memformer):
    def decode(self, targets, *, hidden, hidden_padding_mask=None):
        return 2 * super().decode(targets, hidden=hidden, hidden_padding_mask=hidden_padding_mask)


def test_a_session_refuses_a_memformer_whose_steps_would_not_decode_as_it_does():
    with pytest.raises(InputTypeError, match="OtherReadout overrides decode but not decode_step"):
        Session(OtherReadout(tiny_model().config))


@pytest.mark.filterwarnings("ignore")  # PyTorch announces another package for this
def test_a_quantized_lstm_reads():
    model = tiny_baseline("lstm").float()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    ids = tokens(1, 20)[0].tolist()
    session = Session(quantized)
    single = torch.cat([session.score([token]).reshape(1) for token in ids])
    assert_close(single, Session(quantized).score(ids), relative=0.02)
    assert_close(single, Session(model).score(ids), relative=0.1)


@pytest.mark.parametrize("method", ["replay", "bptt", "checkpoint"])
@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_baseline("transformer-xl")])
def test_a_frozen_model_has_a_loss(make, method):
    model, rollout = make(), random_rollout(3, 2)
    expected = backpropagate(model, rollout, method=method).loss
    model.zero_grad()
    model.requires_grad_(False)
    assert_close(backpropagate(model, rollout, method=method).loss, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["replay", "bptt", "checkpoint"])
def test_weights_that_a_session_may_have_cached_are_refused(method):
    model = tiny_model()
    parametrizations.weight_norm(model.encoder.layers[0].feed_forward.expand)
    with parametrize.cached():
        Session(model).score(tokens(1, 20)[0].tolist())
        with pytest.raises(InputError, match=r"parametrize\.cached\(\) is active"):
            backpropagate(model, random_rollout(3, 2), method=method)
        with pytest.raises(InputError, match=r"parametrize\.cached\(\) is active"):
            ReplayEngine(model, records=False).backpropagate(random_rollout(3, 2))
    assert all(parameter.grad is None for parameter in model.parameters())
