"""Surprisal of tokens: that of a session with the memory, that of `evaluate` with the memory erased."""

import numpy as np
import pytest
import torch

from memformer import InputError, Session, evaluate
from memformer.data import corpus_from_arrays
from memformer.evaluation import streams
from memformer.evaluation.token_surprisal import token_surprisal
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, tiny_model
from tests.models.baselines import tiny_baseline

MODELS = {
    "default": tiny_model,
    "separate attention": lambda: tiny_model(**VARIANTS["separate attention"]),
    "starting from [BOS]": lambda: tiny_model(decoder_start_tokens=0),
    "transformer_xl": lambda: tiny_baseline("transformer-xl"),
}


def document(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(VOCAB_SIZE, size=num_tokens).astype(np.uint8)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("num_tokens", [1, SEGMENT_LENGTH, 5 * SEGMENT_LENGTH + 2])
def test_it_is_what_a_session_and_an_evaluation_measure(make, num_tokens, monkeypatch):
    # Several rollouts, so that the memory is carried from one to the next.
    monkeypatch.setattr(streams, "_TOKENS_AT_ONCE", 2 * SEGMENT_LENGTH)
    model, ids = make(), document(num_tokens)
    with_memory, erased = token_surprisal(model, np.array_split(ids, 3))
    assert with_memory.shape == erased.shape == (num_tokens,)
    assert np.allclose(with_memory, Session(model).score(ids.tolist()).numpy(), rtol=1e-10)
    found = evaluate(model, corpus_from_arrays([ids], vocab_size=VOCAB_SIZE))
    assert erased.sum() == pytest.approx(found.memory_erased.nll, rel=1e-10)
    assert (num_tokens > 2 * SEGMENT_LENGTH) == (not np.allclose(with_memory, erased, rtol=1e-6))


def test_an_empty_document_has_no_surprisal():
    assert [values.shape for values in token_surprisal(tiny_model(), [])] == [(0,), (0,)]


def test_the_models_mode_stays_and_broken_weights_are_refused():
    model = tiny_model(dropout=0.5)
    first, second = (token_surprisal(model, [document(20)])[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="not finite: the model's weights or its memory are broken"):
        token_surprisal(model, [document(20)])
