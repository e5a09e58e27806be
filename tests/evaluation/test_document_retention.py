"""Document retention equals a computation on single documents, and agrees with `evaluate`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, evaluate
from memformer.data import corpus_from_arrays
from memformer.evaluation.document_retention import measure_documents
from tests.evaluation.corpora import documents
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model

LENGTHS = st.lists(st.integers(1, 7 * SEGMENT_LENGTH), min_size=1, max_size=3)


def delayed_nll_by_hand(model, arrays, delay, longest_delay):
    """Return nll and number of the targets at timestep `longest_delay` and later, with all memories kept."""
    nll, num_tokens = 0.0, 0
    for array in arrays:
        memories, segment = [model.initial_memory(1)], torch.tensor([[model.bos_token_id]])
        for timestep, start in enumerate(range(0, len(array), SEGMENT_LENGTH)):
            hidden, _ = model.encode(segment, memory=memories[max(timestep - delay, 0)])
            memories.append(model.encode(segment, memory=memories[timestep])[1])
            segment = torch.tensor(array[None, start : start + SEGMENT_LENGTH])
            if timestep >= longest_delay:
                nll += model.token_nll(segment, hidden=hidden).sum().item()
                num_tokens += segment.shape[1]
    return nll, num_tokens


@settings(max_examples=6)
@given(
    lengths=LENGTHS,
    num_lanes=st.integers(1, 6),
    delays=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_delays_equal_documents_one_by_one(lengths, num_lanes, delays):
    lengths = [*lengths, 7 * SEGMENT_LENGTH]  # one document longer than the longest delay
    model = tiny_model()
    arrays = documents(lengths)
    result = measure_documents(model, corpus_from_arrays(arrays, VOCAB_SIZE), delays=delays, num_lanes=num_lanes)
    assert list(result.delayed_nll) == sorted({0, *delays})
    for delay, nll in result.delayed_nll.items():
        with torch.no_grad():
            expected, num_tokens = delayed_nll_by_hand(model, arrays, delay, max(delays))
        assert nll == pytest.approx(expected, rel=1e-10)
        assert result.num_delayed_tokens == num_tokens


@settings(max_examples=8)
@given(lengths=LENGTHS)
def test_delay_0_and_erased_equal_evaluate(lengths):
    model = tiny_model()
    corpus = corpus_from_arrays(documents([SEGMENT_LENGTH, *lengths]), VOCAB_SIZE)
    expected = evaluate(model, corpus)
    result = measure_documents(model, corpus, delays=[0])
    assert result.num_delayed_tokens == corpus.num_tokens
    assert result.delayed_nll[0] == pytest.approx(expected.with_memory.nll, rel=1e-10)
    assert result.delayed_nll_memory_erased == pytest.approx(expected.memory_erased.nll, rel=1e-10)
    assert result.bits_per_byte(0) == pytest.approx(expected.with_memory.bits_per_byte)
    assert result.older_gain(0) == pytest.approx(expected.memory_gain)


def test_a_delay_that_reaches_the_beginning_is_an_erased_memory():
    # In a document of 5 segments only the last segment counts for a delay of 4, and it reads the initial memory.
    corpus = corpus_from_arrays(documents([5 * SEGMENT_LENGTH, 4 * SEGMENT_LENGTH + 1, 3, 9]), VOCAB_SIZE)
    result = measure_documents(tiny_model(), corpus, delays=[1, 4], num_lanes=2)
    assert result.num_delayed_tokens == SEGMENT_LENGTH + 1
    assert result.delayed_nll[4] == pytest.approx(result.delayed_nll_memory_erased, rel=1e-10)
    assert result.delayed_nll[1] != pytest.approx(result.delayed_nll_memory_erased, rel=1e-6)
    assert result.older_gain(4) == pytest.approx(0, abs=1e-10)
    assert result.recent_gain(0) == 0
    for delay in (0, 1, 4):
        total = result.recent_gain(delay) + result.older_gain(delay)
        assert total == pytest.approx(result.bits_per_byte(None) - result.bits_per_byte(0))


@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 20 * SEGMENT_LENGTH), min_size=1, max_size=3), num_lanes=st.integers(1, 6))
def test_buckets_cover_every_token_once(lengths, num_lanes):
    lengths = [SEGMENT_LENGTH, *lengths]
    model = tiny_model()
    corpus = corpus_from_arrays(documents(lengths), VOCAB_SIZE)
    expected = evaluate(model, corpus)
    seen = []
    result = measure_documents(model, corpus, delays=[0], num_lanes=num_lanes, progress=seen.append)
    assert sum(bucket.num_tokens for bucket in result.buckets) == corpus.num_tokens
    for name, figures in (
        ("bits_per_token", expected.with_memory),
        ("bits_per_token_memory_erased", expected.memory_erased),
    ):
        mean = sum(getattr(bucket, name) * bucket.num_tokens for bucket in result.buckets) / corpus.num_tokens
        assert mean == pytest.approx(figures.bits_per_token, rel=1e-10)
    edges, longest = [0, 1, 2, 4, 8, 16, 32], math.ceil(max(lengths) / SEGMENT_LENGTH)
    for index, bucket in enumerate(result.buckets):
        first, last = edges[index], min(edges[index + 1], longest) - 1
        assert (bucket.first_segment, bucket.last_segment) == (first, last)
        assert bucket.label == (f"{first}" if first == last else f"{first}-{last}")
        in_bucket = [
            np.clip(length - first * SEGMENT_LENGTH, 0, (last - first + 1) * SEGMENT_LENGTH) for length in lengths
        ]
        assert bucket.num_tokens == sum(in_bucket) > 0
    assert result.buckets[0].nll == pytest.approx(result.buckets[0].nll_memory_erased, rel=1e-10)
    assert seen[-1] == sum(math.ceil(length / SEGMENT_LENGTH) for length in lengths)


def test_buckets_equal_documents_one_by_one():
    model = tiny_model()
    arrays = documents([40, 11, 3, 27])
    result = measure_documents(model, corpus_from_arrays(arrays, VOCAB_SIZE), num_lanes=3)
    with torch.no_grad():
        nll = [delayed_nll_by_hand(model, arrays, 0, bucket.first_segment)[0] for bucket in result.buckets]
    for bucket, here, later in zip(result.buckets, nll, [*nll[1:], 0.0], strict=True):
        assert bucket.nll == pytest.approx(here - later, rel=1e-10)


def test_default_delays_are_shorter_than_the_longest_document():
    model = tiny_model()
    for num_segments, expected in ((1, [0]), (2, [0, 1]), (5, [0, 1, 2, 4]), (40, [0, 1, 2, 4, 8, 16, 32])):
        corpus = corpus_from_arrays(documents([num_segments * SEGMENT_LENGTH, 3]), VOCAB_SIZE)
        assert list(measure_documents(model, corpus).delayed_nll) == expected


def test_units_of_documents():
    corpus = corpus_from_arrays(documents([12, 24]), VOCAB_SIZE, document_bytes=[24, 48])
    result = measure_documents(tiny_model(), corpus, delays=[2])
    bits_per_token = result.delayed_nll[2] / result.num_delayed_tokens / math.log(2)
    assert result.num_delayed_tokens == 12
    assert result.bits_per_byte(2) == pytest.approx(bits_per_token / 2)


def test_memory_use_does_not_grow_with_the_documents(monkeypatch):
    monkeypatch.setattr("memformer.evaluation.document_retention._TOKENS_AT_ONCE", 80 * SEGMENT_LENGTH)
    monkeypatch.setattr("memformer.evaluation.document_retention.measure_stability", lambda *_, **__: None)
    sizes = []

    class Spied(type(tiny_model())):
        def encode(self, segment, **options):
            sizes.append(segment.shape[0])
            return super().encode(segment, **options)

    model = tiny_model()
    model.__class__ = Spied
    for num_segments in (20, 50):
        corpus = corpus_from_arrays(documents([num_segments * SEGMENT_LENGTH] * 2), VOCAB_SIZE)
        measure_documents(model, corpus, delays=[0, 1, 4])
    # Two lanes at each timestep, then one batch: ten timesteps of two lanes with the initial memory and two delays.
    assert sizes == [*[2] * 10, 60] * 7


def test_measuring_documents_leaves_mode_and_randomness_alone():
    model = tiny_model(dropout=0.5).train()
    before = torch.get_rng_state()
    corpus = corpus_from_arrays(documents([40]), VOCAB_SIZE)
    first, second = (measure_documents(model, corpus) for _ in range(2))
    assert first.delayed_nll == second.delayed_nll
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_documents_that_cannot_be_measured_are_refused():
    model = tiny_model()
    corpus = corpus_from_arrays(documents([4 * SEGMENT_LENGTH, 5]), VOCAB_SIZE)
    for delays, message in (
        ([1, -1], r"delays \(-1\) must be at least 0"),
        (
            [4],
            r"the longest delay \(4 segments of 6 tokens\) must be less than the length of the longest document "
            r"\(4 segments\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            measure_documents(model, corpus, delays=delays)
    with pytest.raises(InputError, match="vocabulary of 12 tokens, the model one of 11"):
        measure_documents(model, corpus_from_arrays(documents([40]), 12))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        measure_documents(model, corpus)
