"""Sessions of a model whose weights change, or are converted, while the session lasts."""

import copy
import pickle

import pytest
import torch

from memformer import Rollout, Session, backpropagate
from memformer.generation.changed_weights import checksum_of, identify_weights
from memformer.generation.contexts import SegmentContext
from tests.helpers import VOCAB_SIZE, assert_close, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline

TOKENS = [1, 2, 3, 4, 5, 0, 6, 2, 1]
OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.5),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 0.1),
    "fused": lambda weights: torch.optim.AdamW(weights, 0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_decoded_is_decoded_again_after_a_training_step(name):
    model = tiny_model()
    session = Session(model)
    session.feed(TOKENS)
    before = session.next_token_logits()
    tokens = torch.randint(0, VOCAB_SIZE, (2, 2, model.segment_length))
    backpropagate(model, Rollout(inputs=tokens, targets=tokens))
    OPTIMIZERS[name](model.parameters()).step()
    after = session.next_token_logits()
    assert_close(after, copy.deepcopy(session).next_token_logits())
    assert (after - before).abs().max() > 1e-3


def test_weights_that_are_replaced_and_trained_apart_are_noticed():
    """With `assign`, a model gets other parameters; a fused step leaves no trace in versions, nor in frozen weights."""
    model, other = tiny_model(), tiny_model(seed=1)
    session = Session(model)
    session.feed(TOKENS)
    before = session.next_token_logits()
    model.load_state_dict(other.state_dict(), assign=True)
    after = session.next_token_logits()
    assert (after - before).abs().max() > 1e-3
    assert_close(after, copy.deepcopy(session).next_token_logits())
    for weight in model.parameters():
        weight.requires_grad_(weight is model.embedding.weight)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 2, model.segment_length))
    backpropagate(model, Rollout(inputs=tokens, targets=tokens), method="bptt")
    torch.optim.AdamW([model.embedding.weight], 0.1, fused=True).step()
    assert_close(session.next_token_logits(), copy.deepcopy(session).next_token_logits())
    assert (session.next_token_logits() - after).abs().max() > 1e-3


class Adapter(torch.nn.Module):
    """Replaces a linear layer, as low-rank adapters do."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.scale = torch.nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) * self.scale


def adapt(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name in ("expand", "projection"):
                setattr(module, name, Adapter(child))


def change_data(model):
    for weight in model.parameters():
        weight.data.mul_(1.1)


def train_by_likelihood(model):
    tokens = torch.randint(0, VOCAB_SIZE, (2, 2, model.segment_length))
    backpropagate(model, model.align_inputs(Rollout(inputs=tokens, targets=tokens)))
    torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()


@pytest.mark.parametrize("name", ["memformer", "transformer-xl", "compressive"])
@pytest.mark.parametrize(
    ("change", "is_frozen"),
    [(adapt, False), (adapt, True), (change_data, False), (change_data, True), (train_by_likelihood, False)],
)
def test_changes_that_leave_no_trace_in_versions_are_noticed(name, change, is_frozen):
    model = tiny_model() if name == "memformer" else tiny_baseline(name)
    model.requires_grad_(not is_frozen)
    session = Session(model)
    session.feed(TOKENS)
    before = session.next_token_logits()
    change(model)
    after = session.next_token_logits()
    assert (after - before).abs().max() > 1e-3
    assert_close(after, copy.deepcopy(session).next_token_logits())


def test_weights_made_in_inference_mode_are_watched():
    with torch.inference_mode():
        model = tiny_model()
        session = Session(model)
        session.feed(TOKENS)
        before = session.next_token_logits()
        for weight in model.parameters():
            weight.mul_(1.1)
        after = session.next_token_logits()
    assert (after - before).abs().max() > 1e-3


def test_a_conversion_that_fails_leaves_the_state(monkeypatch):
    model = tiny_model()
    session, expected = Session(model), Session(model)
    for each in (session, expected):
        each.feed(TOKENS)
    model.to(torch.float32)
    load = SegmentContext.load
    monkeypatch.setattr(SegmentContext, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.feed(TOKENS)
    monkeypatch.setattr(SegmentContext, "load", load)
    session.feed([])
    assert_close(session.next_token_logits(), expected.next_token_logits())


@pytest.mark.parametrize("kind", ["memformer", *BASELINES])
def test_a_session_follows_its_model_to_another_dtype(kind, tmp_path):
    model = tiny_model() if kind == "memformer" else tiny_baseline(kind)
    session = Session(model)
    session.feed(TOKENS)
    session.next_token_logits()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert session.next_token_logits().isfinite().all()
        session.feed(TOKENS)
        session.save(tmp_path / "state")
        assert_close(session.next_token_logits(), Session.load(tmp_path / "state", model=model).next_token_logits())
    assert session.num_tokens == [3 * len(TOKENS)]


def test_a_pickled_session_goes_on():
    session = Session(tiny_model())
    session.feed(TOKENS)
    session.generate(3, temperature=0)
    restored = pickle.loads(pickle.dumps(session))  # noqa: S301  made here
    assert restored.generate(9, temperature=0) == session.generate(9, temperature=0)


def swap_rows(weight):
    weight[[1, 2]] = weight[[2, 1]].clone()


def roll_columns(weight):
    weight.copy_(weight.roll(weight.shape[-1] // 2, -1))


def swap_neighbours(weight):
    weight.view(-1)[[4, 5]] = weight.view(-1)[[5, 4]].clone()


def set_nan(weight):
    weight.view(-1)[3] = float("nan")


@pytest.mark.parametrize("shape", [(8, 16), (5, 5), (16,), (3, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [swap_rows, roll_columns, swap_neighbours, set_nan])
def test_a_checksum_sees_changes_that_leave_sum_and_norm(change, dtype, shape):
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    known = checksum_of(weight)
    assert checksum_of(weight.clone()) == known
    change(weight)
    assert checksum_of(weight) != known
    assert checksum_of(weight.clone()) == checksum_of(weight)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_weights_of_any_shape_have_a_checksum(shape):
    assert checksum_of(torch.ones(shape)) == checksum_of(torch.ones(shape))


def test_the_identity_of_weights_sees_a_change_of_their_data():
    model = tiny_model()
    known = identify_weights(model)
    assert identify_weights(model) == known
    swap_rows(model.embedding.weight.data)
    assert identify_weights(model) != known
