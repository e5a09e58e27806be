"""Compiled decoding equals eager decoding, is compiled once, and uses changed weights."""

import gc

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from memformer import InputError, Session, backpropagate
from memformer.generation.compiling import _functions, compiled_function
from memformer.models.presets import PAPER_DECODER
from tests.compiled.compiler import needs_compiler
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, random_rollout, tiny_model

# torch.compile emits warnings about torch's own code.
pytestmark = pytest.mark.filterwarnings("default")


def make_pair(batch_size=1, **changes):
    # One layer unless stated, because compiling takes seconds per layer.
    model = tiny_model(**{"num_encoder_layers": 1, "num_decoder_layers": 1, **changes}).float()
    return [Session(model, batch_size=batch_size, compiled=compiled) for compiled in (False, True)]


def random_rows(*lengths):
    return [torch.randint(0, VOCAB_SIZE, (length,)).tolist() for length in lengths]


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_start_tokens": 0, "adaptive_cutoffs": (4, 8)},
        {"num_decoder_layers": 2},  # a layer reads the cache that the same graph has written
        {"num_decoder_layers": 2, **PAPER_DECODER},
    ],
)
def test_compiled_logits_equal_eager_logits_at_every_position(changes):
    eager, compiled = make_pair(**changes)
    compiled._streams.context.reader.compiled = False  # reading has a test of its own
    for (token,) in zip(*random_rows(3 * SEGMENT_LENGTH), strict=True):
        for session in (eager, compiled):
            session.feed([token])
        assert_close(compiled.next_token_logits(), eager.next_token_logits(), relative=1e-5)


@needs_compiler
def test_rows_at_different_positions_are_decoded_together_without_recompilation():
    eager, compiled = make_pair(batch_size=3, write_competition=True, num_decoder_layers=2)
    counters.clear()
    # The first row is still in its first segment, where the past has padding; later, no row is.
    rows = random_rows(2, SEGMENT_LENGTH + 4, 3 * SEGMENT_LENGTH)
    eager.feed(rows)
    for start in range(0, len(rows[2]), 8):  # in other parts
        compiled.feed([row[start : start + 8] for row in rows])
    assert compiled.num_tokens == eager.num_tokens
    assert_close(compiled.memory, eager.memory, relative=1e-5)
    assert compiled.generate(SEGMENT_LENGTH, temperature=0) == eager.generate(SEGMENT_LENGTH, temperature=0)
    num_graphs = counters["stats"]["unique_graphs"]
    assert compiled.generate(3 * SEGMENT_LENGTH, temperature=0) == eager.generate(3 * SEGMENT_LENGTH, temperature=0)
    # Another session with the same model needs no recompilation either.
    other = Session(compiled.model, batch_size=3, compiled=True)
    other.feed(rows)
    assert other.generate(4 * SEGMENT_LENGTH, temperature=0) == decoded_by(eager.model, rows, 4 * SEGMENT_LENGTH)
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


def decoded_by(model, rows, num_tokens):
    session = Session(model, batch_size=len(rows))
    session.feed(rows)
    return session.generate(num_tokens, temperature=0)


def apply(model, x):
    return model(x)


@needs_compiler
def test_changed_weights_are_compiled_again_and_a_deleted_model_leaves_no_compiled_function():
    # Large enough for the weights to be packed; smaller ones are used in place.
    model, x = torch.nn.Linear(256, 256), torch.ones(1, 256)
    for _ in range(2):
        assert_close(compiled_function(apply, model, (x,), key="apply")(model, x), model(x), relative=1e-5)
        with torch.no_grad():
            model.weight.mul_(2)
    assert len(_functions[model]) == 1
    gc.collect()
    num_models = len(_functions)
    del model
    gc.collect()
    assert len(_functions) == num_models - 1


@needs_compiler
def test_a_replaced_module_is_compiled_again():
    """It has no weights, so that these are the same."""
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(3, 4)
    for activation in (torch.nn.ReLU(), torch.nn.Tanh()):
        model[1] = activation
        assert_close(compiled_function(apply, model, (x,), key="apply")(model, x), model(x), relative=1e-5)


@needs_compiler
def test_weights_made_in_inference_mode_can_be_compiled():
    with torch.inference_mode():
        model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
        assert_close(compiled_function(apply, model, (x,), key="apply")(model, x), model(x), relative=1e-5)
    assert not _functions[model]["apply"].is_stale(model)


def test_a_token_of_a_model_that_was_compiled_in_place_makes_no_graph():
    """Every number of cached tokens would be another shape, which takes seconds, and the graphs of training."""
    eager, compiled = (Session(tiny_model(num_decoder_layers=2)) for _ in range(2))
    compiled.model.compile(backend="eager")
    counters.clear()
    (row,) = random_rows(2 * SEGMENT_LENGTH)
    for session in (eager, compiled):
        session.feed(row)
        session.next_token_logits()
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0  # segments, and the beginning of one, are read by compiled layers
    for token in random_rows(SEGMENT_LENGTH - 1)[0]:
        for session in (eager, compiled):
            session.feed([token])
        assert_close(compiled.next_token_logits(), eager.next_token_logits())
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_the_decoding_step_is_asked_for_at_every_segment(monkeypatch):
    """So that weights changed in between are used."""
    keys = []

    def not_compiled(function, model, example, *, key):
        keys.append(key)
        return function

    monkeypatch.setattr("memformer.generation.decoding.compiled_function", not_compiled)
    _, compiled = make_pair()
    compiled._streams.context.reader.compiled = False
    for count in range(1, 4):
        compiled.next_token_logits()
        compiled.feed(random_rows(SEGMENT_LENGTH)[0])
        assert len(keys) == count - 1  # the first segment, which has padding, is decoded without compilation


def test_a_missing_compiler_is_an_input_error():
    nothing = inductor_config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with nothing, fresh_cache(), pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        compiled_function(apply, torch.nn.Linear(2, 2), (torch.ones(1, 2),), key="apply")


def test_relative_positions_are_refused():
    with pytest.raises(InputError, match=r"positions \('relative'\) must be 'rotary' to compile a session"):
        make_pair(positions="relative")


@needs_compiler
@pytest.mark.parametrize("change", ["fused optimizer", "data"])
def test_changes_that_leave_no_version_behind_are_noticed(change):
    """Compiled code for a CPU holds the values of the weights; a new session must not get that of old weights."""
    eager, compiled = make_pair()
    model, (row,) = eager.model, random_rows(2 * SEGMENT_LENGTH)
    compiled.feed(row)
    before = compiled.next_token_logits()
    versions = [weight._version for weight in model.parameters()]
    if change == "data":
        model.embedding.weight.data.mul_(1.5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        backpropagate(model.train(), random_rollout(2, 2))
        optimizer.step()
        model.eval()
    assert [weight._version for weight in model.parameters()] == versions
    later, again = (Session(model, compiled=is_compiled) for is_compiled in (False, True))
    for session in (later, again):
        session.feed(row)
    assert_close(again.next_token_logits(), later.next_token_logits(), relative=1e-5)
    assert not torch.allclose(again.next_token_logits(), before, rtol=1e-3)
