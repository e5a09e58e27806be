"""Scores of tokens: those of single predictions and of an evaluation, for any split, at the cost of one decoding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, InputTypeError, Session, evaluate
from memformer.data import corpus_from_arrays
from memformer.generation import token_ids
from tests.generation.sessions import assert_same_state, random_tokens
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, assert_close, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline

MODELS = {
    **{name: lambda v=variant: tiny_model(**v) for name, variant in VARIANTS.items()},
    **{name: lambda n=name: tiny_baseline(n) for name in BASELINES},
}
models = pytest.mark.parametrize("name", MODELS)


def log_probabilities(session, tokens):
    """Return the log-probabilities that predict each token of a stream, one token at a time."""
    rows = [torch.empty(0, VOCAB_SIZE, dtype=torch.float64)]
    for token in tokens:
        rows.append(session.next_token_logits().log_softmax(-1))
        session.feed([token])
    return torch.cat(rows)


@models
def test_scores_equal_those_of_single_predictions(name):
    """Also in rows of different length, after other tokens, and the state is that of `feed`."""
    model = MODELS[name]()
    rows = [random_tokens(count, seed=count) for count in (0, 5, SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 1)]
    together, fed, logits = (Session(model, batch_size=len(rows)) for _ in range(3))
    more = [random_tokens(count, seed=9) for count in (1, 0, 2 * SEGMENT_LENGTH - 1, 3)]
    found = [together.score(part) for part in (rows, more)]
    predicted = [logits.token_logits(part) for part in (rows, more)]
    for part in (rows, more):
        fed.feed(part)
    assert_same_state(together, fed)
    assert_same_state(logits, fed)
    for index, row in enumerate(rows):
        tokens = [*row, *more[index]]
        expected = log_probabilities(Session(model), tokens)
        nll = torch.cat([part[index] for part in found])
        assert nll.dtype == torch.float64
        assert_close(nll, -expected[range(len(tokens)), tokens])
        assert_close(torch.cat([part[index] for part in predicted]).log_softmax(-1), expected)


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_baseline("compressive, uneven")])
@settings(max_examples=15)
@given(data=st.data())
def test_a_split_changes_no_score(make, data):
    model = make()
    tokens = random_tokens(data.draw(st.integers(0, 5 * SEGMENT_LENGTH)))
    expected = Session(model).score(tokens)
    split, pieces, position = Session(model), [expected[:0]], 0
    while position < len(tokens):
        part = tokens[position : position + data.draw(st.integers(1, 2 * SEGMENT_LENGTH + 1))]
        if data.draw(st.booleans()):
            split.next_token_logits()  # what is decoded already must not matter
        pieces.append(split.score(part))
        position += len(part)
    assert_close(torch.cat(pieces), expected)


@models
def test_scores_sum_to_an_evaluation(name):
    model = MODELS[name]()
    documents = [random_tokens(count, seed=count) for count in (1, SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 2)]
    corpus = corpus_from_arrays([np.array(tokens) for tokens in documents], vocab_size=VOCAB_SIZE)
    scores = Session(model, batch_size=3).score(documents)
    expected = evaluate(model, corpus, num_lanes=2, rollout_length=2).with_memory.nll
    assert_close(torch.cat(scores).sum(), torch.tensor(expected, dtype=torch.float64))


def test_a_long_input_is_converted_in_parts(monkeypatch):
    model = tiny_model()
    expected = Session(model).score(random_tokens(50))
    monkeypatch.setattr(token_ids, "_CHUNK_TOKENS", 7)
    assert_close(Session(model).score(random_tokens(50)), expected)


@pytest.mark.parametrize("name", ["default", "lstm", "recurrent memory", "transformer-xl"])
def test_every_segment_is_read_once_and_decoded_once(name, monkeypatch):
    model = MODELS[name]()
    tokens = random_tokens(10 * SEGMENT_LENGTH)
    read, decoded = [], []
    encode, decode = model.encode, model._features

    def counted_encode(segment, **options):
        read.append(segment.numel())
        return encode(segment, **options)

    def counted_decode(targets, *arguments):
        decoded.append(targets.numel())
        return decode(targets, *arguments)

    monkeypatch.setattr(model, "encode", counted_encode)
    monkeypatch.setattr(model, "_features", counted_decode)
    Session(model).feed(tokens)
    to_feed = len(read)
    assert not decoded
    read.clear()
    Session(model).score(tokens)
    assert len(read) == to_feed
    assert sum(decoded) == 10 * SEGMENT_LENGTH
    assert len(decoded) <= 2


def test_float32_and_half_precision_models_give_float32_scores():
    for dtype in (torch.float32, torch.bfloat16):
        session = Session(tiny_model().to(dtype), batch_size=2)
        assert [row.dtype for row in session.score([[1, 2, 3], []])] == [torch.float32] * 2


def test_wrong_tokens_and_broken_weights_are_named_before_anything_is_read():
    session = Session(tiny_model(), batch_size=2)
    with pytest.raises(InputError, match=f"token id {VOCAB_SIZE} is outside the vocabulary"):
        session.score([[1], [VOCAB_SIZE]])
    with pytest.raises(InputTypeError, match="token ids have dtype float32"):
        session.token_logits(torch.zeros(2, 3))
    assert session.num_tokens == [0, 0]
    with torch.no_grad():
        session.model.encoder.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="likelihood is not finite: the model's weights or its memory are broken"):
        session.score([[1] * 9, [2]])
