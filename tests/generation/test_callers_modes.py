"""Sessions and evaluations compute the same under all modes of the caller, and leave these modes unchanged."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn

from memformer import InputTypeError, Session, backpropagate, evaluate
from memformer.data import corpus_from_arrays
from tests.helpers import VARIANTS, VOCAB_SIZE, assert_close, random_rollout, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline
from tests.training.gradients import assert_gradients, gradients_of

MODELS = {"memformer": tiny_model, **{name: lambda n=name, **o: tiny_baseline(n, **o) for name in BASELINES}}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.fixture
def tiny_corpus():
    documents = [torch.tensor(IDS[:count]).numpy() for count in (14, 3, 9)]
    return corpus_from_arrays(documents, vocab_size=VOCAB_SIZE)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradient": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default device": lambda: default_device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_session_is_the_same_inside_and_outside_a_mode(name, mode, tmp_path):
    """A session made under a mode goes on outside of it, and the other way round."""
    model = MODELS[name]().float()
    plain = Session(model)
    plain.feed(IDS)
    expected = plain.generate(9, temperature=0)
    with MODES[mode]():
        inside = Session(model)
        inside.feed(IDS[:8])
        inside.next_token_logits()
        inside.save(tmp_path / "session")
        loaded, copied = Session.load(tmp_path / "session", model=model), copy.deepcopy(inside)
    outside = Session(model)
    outside.feed(IDS[:8])
    for session in (inside, loaded, copied):
        session.feed(IDS[8:])
        assert session.generate(9, temperature=0) == expected
    with MODES[mode]():
        outside.feed(IDS[8:])
        assert outside.generate(9, temperature=0) == expected
    assert torch.equal(inside.memory, plain.memory)


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_is_the_same_under_any_mode(mode, tiny_corpus):
    model = tiny_model().float()
    expected = evaluate(model, tiny_corpus)
    with MODES[mode]():
        assert evaluate(model, tiny_corpus) == expected


def modes_of(model):
    return [module.training for module in model.modules()]


def test_every_module_keeps_its_own_mode(tiny_corpus):
    """A module that the user has put in another mode than the model stays in it, and there is no dropout in between."""
    model = tiny_model(dropout=0.5)
    model.train()
    model.encoder.eval()
    before = modes_of(model)
    expected = Session(copy.deepcopy(model).eval())
    expected.feed(IDS)
    session = Session(model)
    session.feed(IDS)
    assert torch.equal(session.next_token_logits(), expected.next_token_logits())
    evaluate(model, tiny_corpus)
    assert modes_of(model) == before
    # The root is in evaluation mode, and one layer is not.
    model.eval()
    model.encoder.layers[0].train()
    before = modes_of(model)
    session = Session(model)
    session.feed(IDS)
    assert torch.equal(session.memory, expected.memory)
    assert modes_of(model) == before


def test_sessions_in_threads_agree_while_the_model_is_in_training_mode():
    model = tiny_model(dropout=0.5).train()
    expected = Session(model).generate(20, temperature=0)
    found = []

    def work():
        found.append(Session(model).generate(20, temperature=0))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
    assert all(modes_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_session_goes_on_by_itself(name):
    """A copy has the same state and the same model, and its memory does not hang on a parameter's graph."""
    session = Session(MODELS[name](), batch_size=2)
    assert session.memory.numpy().shape == session.memory.shape
    fresh = copy.deepcopy(session)
    session.feed([IDS, IDS[:5]])
    session.next_token_logits()
    copied = copy.deepcopy(session)
    assert copied.model is session.model
    assert copied.generate(9, temperature=0) == session.generate(9, temperature=0)
    copied.feed([[1], [2]])
    assert copied.num_tokens == [count + 1 for count in session.num_tokens]
    assert fresh.num_tokens == [0, 0]


class Parallel(nn.DataParallel):
    """DataParallel, which on a machine without CUDA only wraps."""


# torch.compile warns of torch's own code.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("wrap", [torch.compile, Parallel])
def test_a_wrapped_model_is_read_like_the_model_inside(wrap, tiny_corpus):
    model = tiny_model()
    expected = Session(model)
    expected.feed(IDS)
    session = Session(wrap(model))
    session.feed(IDS)
    assert session.generate(5, temperature=0) == expected.generate(5, temperature=0)
    assert evaluate(wrap(model), tiny_corpus) == evaluate(model, tiny_corpus)


@pytest.mark.filterwarnings("default")
def test_a_compiled_model_can_be_trained_and_a_parallel_one_is_refused_in_one_sentence():
    model, rollout = tiny_model(), random_rollout(2, 2)
    assert_close(backpropagate(torch.compile(model), rollout).loss, backpropagate(model, rollout).loss)
    with pytest.raises(InputTypeError, match=r"model is a Parallel, .* give\s+model.module"):
        backpropagate(Parallel(model), rollout)


# The rows of the adaptive softmax's clusters depend on the tokens, which vmap does not support.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"adaptive softmax"}))
def test_per_sample_gradients_by_vmap_equal_those_of_single_rows(variant):
    """Gradients of each row by torch.func equal those of a rollout with that row alone."""
    model = tiny_model(**VARIANTS[variant])
    rollout = random_rollout(1, 3)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, inputs, targets):
        def run():
            hidden, _ = model.encode(inputs[None])
            return model.token_nll(targets[None], hidden=hidden).sum()

        return torch.func.functional_call(Wrapped(model, run), {f"model.{n}": p for n, p in parameters.items()}, ())

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, rollout.inputs[0], rollout.targets[0]
    )
    for row in range(3):
        model.zero_grad()
        hidden, _ = model.encode(rollout.inputs[0, row : row + 1])
        model.token_nll(rollout.targets[0, row : row + 1], hidden=hidden).sum().backward()
        assert_gradients({name: rows[row] for name, rows in per_sample.items()}, gradients_of(model))


class Wrapped(nn.Module):
    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self):
        return self.run()


def test_token_ids_of_the_vocabulary_only():
    with pytest.raises(ValueError, match=rf"valid ids are 0 to {VOCAB_SIZE - 1}"):
        Session(tiny_model()).feed([VOCAB_SIZE])
