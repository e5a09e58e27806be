"""Every token of every document counts once, whatever the number of lanes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, evaluate
from memformer.data import corpus_from_arrays
from memformer.evaluation import likelihood
from memformer.evaluation.recorded_calls import RecordedCalls
from memformer.generation import recording
from memformer.utils.cuda_graphs import CannotRecord
from tests.evaluation.corpora import documents
from tests.generation.sessions import document_log_probabilities
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, StandInPool, tiny_model
from tests.models.baselines import TYPES, tiny_baseline


def nll_by_hand(model, arrays):
    total = 0.0
    for array in arrays:
        tokens = array.tolist()
        log_probabilities = document_log_probabilities(model, tokens)
        total -= log_probabilities.gather(-1, torch.tensor(tokens)[:, None]).sum().item()
    return total


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 4 * SEGMENT_LENGTH), min_size=1, max_size=5),
    num_lanes=st.integers(1, 6),
    rollout_length=st.integers(1, 5),
)
def test_packed_evaluation_equals_documents_one_by_one(lengths, num_lanes, rollout_length):
    lengths = [SEGMENT_LENGTH, *lengths]
    model = tiny_model()
    arrays = documents(lengths)
    result = evaluate(model, corpus_from_arrays(arrays, VOCAB_SIZE), num_lanes=num_lanes, rollout_length=rollout_length)
    assert result.with_memory.num_tokens == sum(lengths)
    assert result.with_memory.nll == pytest.approx(nll_by_hand(model, arrays), rel=1e-10)


def test_erased_memory_is_the_initial_memory_before_every_segment():
    model = tiny_model()
    (array,) = documents([4 * SEGMENT_LENGTH])
    result = evaluate(model, corpus_from_arrays([array], VOCAB_SIZE))
    nll, segment = 0.0, torch.tensor([[model.bos_token_id]])
    for start in range(0, len(array), SEGMENT_LENGTH):
        hidden, _ = model.encode(segment, memory=model.initial_memory(1))
        segment = torch.tensor(array[None, start : start + SEGMENT_LENGTH])
        nll += model.token_nll(segment, hidden=hidden).sum().item()
    assert result.memory_erased.nll == pytest.approx(nll, rel=1e-10)
    assert result.memory_erased.nll != pytest.approx(result.with_memory.nll, rel=1e-6)


@pytest.mark.parametrize(("kind", "refused"), [("memformer", 2), *((name, None) for name in ("memformer", *TYPES))])
def test_recorded_calls_give_the_same_likelihood(kind, refused, monkeypatch, capsys):
    model = tiny_model() if kind == "memformer" else tiny_baseline(kind)
    corpus = corpus_from_arrays(documents([6 * SEGMENT_LENGTH, *range(1, 40, 7)]), VOCAB_SIZE)
    expected = evaluate(model, corpus, num_lanes=2, rollout_length=3)
    pool = StandInPool(CannotRecord, at=refused)
    monkeypatch.setattr(RecordedCalls, "CALLS_BEFORE_RECORDING", 1)
    recording._said.clear()
    monkeypatch.setattr(likelihood, "RecordedCalls", lambda model: RecordedCalls(model, pool=pool))
    actual = evaluate(model, corpus, num_lanes=2, rollout_length=3)
    assert pool.num_records >= 4
    assert actual.with_memory.nll == pytest.approx(expected.with_memory.nll, rel=1e-10)
    assert actual.memory_erased.nll == pytest.approx(expected.memory_erased.nll, rel=1e-10)
    assert capsys.readouterr().err.count("cannot become a CUDA graph") == int(refused is not None)


def test_few_calls_are_not_recorded_and_results_do_not_change_later():
    pool = StandInPool()
    calls = RecordedCalls(tiny_model(), pool=pool)

    def double(model, tensor, absent):
        assert absent is None
        return (2 * tensor,)

    results = [calls(double, torch.full((2,), float(number)), None, name="doubling")[0] for number in range(7)]
    assert [result.tolist() for result in results] == [[2.0 * number] * 2 for number in range(7)]
    assert pool.num_records == 1
    calls(double, torch.zeros(3), None, name="doubling")
    assert pool.num_records == 1


def test_documents_shorter_than_a_segment_are_evaluated():
    model = tiny_model()
    arrays = documents([2])
    result = evaluate(model, corpus_from_arrays(arrays, VOCAB_SIZE))
    assert result.with_memory.nll == pytest.approx(nll_by_hand(model, arrays), rel=1e-10)


def test_units():
    corpus = corpus_from_arrays(documents([12, 24]), VOCAB_SIZE, document_bytes=[24, 48])
    figures = evaluate(tiny_model(), corpus).with_memory
    assert figures.bits_per_token == pytest.approx(2 * figures.bits_per_byte)
    assert 2**figures.bits_per_token == pytest.approx(figures.perplexity)
    assert figures.nll == pytest.approx(figures.bits_per_token * 36 * np.log(2))


def test_evaluation_leaves_mode_and_randomness_alone():
    model = tiny_model(dropout=0.5).train()
    before = torch.get_rng_state()
    corpus = corpus_from_arrays(documents([40]), VOCAB_SIZE)
    assert evaluate(model, corpus) == evaluate(model, corpus)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_other_vocabularies_and_broken_weights_are_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="vocabulary of 12 tokens, the model one of 11"):
        evaluate(model, corpus_from_arrays(documents([40]), 12))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="likelihood is not finite: the model's weights"):
        evaluate(model, corpus_from_arrays(documents([40]), VOCAB_SIZE))
