"""Multi-task training: tasks are drawn per timestep, independent of rollouts and lanes, and documents stay intact."""

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from memformer import InputError, LSTMConfig, backpropagate
from memformer.data import MultitaskConfig, MultitaskStream
from memformer.data.multitask import INFILLING, MASK, NUM_TASK_TOKENS, RECALL, mask_spans
from memformer.errors import CheckpointError
from memformer.training.config import DataConfig, RunConfig
from tests.data.streams import BOS, make_corpus, padding_of, stream_of, timesteps
from tests.helpers import VOCAB_SIZE, assert_close, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline
from tests.training.gradients import assert_same_gradients, gradients

SEGMENT = 8


def multitask_of(corpus, lanes=3, rollout=4, seed=7, num_epochs=None, **tasks):
    return MultitaskStream(
        corpus,
        MultitaskConfig(**tasks),
        num_lanes=lanes,
        segment_length=SEGMENT,
        rollout_length=rollout,
        bos_token_id=BOS,
        seed=seed,
        num_epochs=num_epochs,
    )


def timesteps_by_document(stream, limit=None):
    """Return every timestep as (tokens read, tokens predicted, start token as an offset from [BOS]), by document."""
    found = {}
    for rollout, documents in islice(iter(stream.next_with_documents, None), limit):
        read = padding_of(rollout.input_padding, rollout.inputs)
        counts = ~padding_of(rollout.target_padding, rollout.targets)
        for n in range(rollout.num_timesteps):
            for lane, document in enumerate(documents[n].tolist()):
                if document < 0:
                    continue
                parts = rollout.inputs[n, lane][~read[n, lane]], rollout.targets[n, lane][counts[n, lane]]
                found.setdefault(document, []).append(
                    (*(part.tolist() for part in parts), int(rollout.decoder_start_ids[n, lane]) - BOS)
                )
    return found


def with_decoder_start_ids(rollout):
    decoder_start_ids = torch.arange(rollout.reset.numel()).view_as(rollout.reset) % 4 + VOCAB_SIZE
    return dataclasses.replace(rollout, decoder_start_ids=decoder_start_ids)


def test_continuation_alone_is_the_stream_of_documents():
    corpus = make_corpus(100, 37, 8, 55)
    plain = stream_of(corpus, lanes=3, segment=SEGMENT, rollout=4, seed=7, num_epochs=1)
    mixed = multitask_of(corpus, num_epochs=1, continuation=1.0, infilling=0.0, recall=0.0)
    assert timesteps(mixed) == timesteps(plain)
    assert {
        start for rows in timesteps_by_document(multitask_of(corpus, num_epochs=1)).values() for *_, start in rows
    } > {0}


def test_every_timestep_has_one_of_the_tasks_at_its_probability():
    length = SEGMENT * 400
    corpus = make_corpus(length, length)
    counts = np.zeros(4, int)
    for document, rows in timesteps_by_document(multitask_of(corpus, lanes=2, num_epochs=1)).items():
        tokens = corpus.document(document)
        segments = [tokens[at * SEGMENT : (at + 1) * SEGMENT].tolist() for at in range(400)]
        assert len(rows) == 400
        for at, (read, predicted, start) in enumerate(rows):
            counts[start] += 1
            before = [BOS] if at == 0 else segments[at - 1]
            if start == 0:
                assert (read, predicted) == (before, segments[at])
            elif start == RECALL:
                assert at > 1
                assert (read, predicted) == (before, segments[at - 2])
            else:
                assert start == INFILLING
                assert at > 0
                assert predicted == before
                assert read.count(BOS + MASK) >= 1
                kept = [token for token in read if token != BOS + MASK]
                assert kept == [token for token in before if token in kept]
                assert len(kept) == SEGMENT - round(0.3 * SEGMENT)
    assert counts[0] / 800 == pytest.approx(0.6, abs=0.05)
    assert counts[INFILLING] / 800 == pytest.approx(0.3, abs=0.05)
    assert counts[RECALL] / 800 == pytest.approx(0.1, abs=0.03)


def test_draws_depend_on_documents_not_on_rollouts_or_lanes():
    corpus = make_corpus(100, 37, 8, 55)
    once = timesteps_by_document(multitask_of(corpus, num_epochs=1))
    assert timesteps_by_document(multitask_of(corpus, lanes=1, num_epochs=1)) == once
    assert timesteps_by_document(multitask_of(corpus, rollout=1, num_epochs=1)) == once
    assert timesteps_by_document(multitask_of(corpus, seed=8, num_epochs=1)) != once
    twice = timesteps_by_document(multitask_of(corpus, lanes=1, num_epochs=2))
    assert any(rows[: len(rows) // 2] != rows[len(rows) // 2 :] for rows in twice.values())


def test_the_cursor_resumes_exactly_and_belongs_to_its_tasks():
    corpus = make_corpus(100, 37, 8, 55)
    stream = multitask_of(corpus)
    for _ in range(3):
        next(stream)
    resumed = multitask_of(corpus)
    resumed.load_state(stream.state())
    for _ in range(5):
        ours, theirs = next(resumed), next(stream)
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.decoder_start_ids, theirs.decoder_start_ids)
    with pytest.raises(CheckpointError, match="the data cursor has multitask"):
        multitask_of(corpus, continuation=0.5, infilling=0.4).load_state(stream.state())


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_each_mask_replaces_one_span(fraction):
    tasks = MultitaskConfig(masked_fraction=fraction)
    tokens = np.arange(100, 150)
    for seed in range(20):
        masked = mask_spans(tokens, tasks, mask_token_id=7, generator=np.random.default_rng(seed))
        kept = masked[masked != 7]
        assert len(kept) == 50 - max(1, round(50 * fraction))
        assert (np.diff(kept) > 0).all()
        gaps = int((np.diff(np.concatenate([[99], kept, [150]])) > 1).sum())
        assert (masked == 7).sum() == gaps


@pytest.mark.parametrize("method", ["checkpoint", "replay"])
def test_with_tasks_replay_and_checkpoint_equal_bptt(method):
    model = tiny_model(num_special_tokens=NUM_TASK_TOKENS, dropout=0.2)
    rollout = with_decoder_start_ids(random_rollout(5, 3, resets=True, padding=True))
    assert set((rollout.decoder_start_ids - VOCAB_SIZE).unique().tolist()) == {0, 1, 2, 3}
    memory = model.initial_memory(3).detach()
    expected = gradients(model, rollout, memory, "bptt", readout_timesteps=2)
    assert_same_gradients(gradients(model, rollout, memory, method, readout_timesteps=2), expected)


def test_the_readout_uses_the_decoder_start_ids():
    model = tiny_model(num_special_tokens=NUM_TASK_TOKENS)
    rollout = with_decoder_start_ids(random_rollout(5, 3, resets=True))
    memory, nll = model.initial_memory(3).detach(), 0.0
    result = backpropagate(model, rollout, memory=memory, readout_timesteps=2)
    for t in range(5):
        hidden, memory = model.encode(rollout.inputs[t], memory=model.reset_memory(memory, rollout.reset[t]))
        nll = (
            nll
            + model.token_nll(rollout.targets[t], hidden=hidden, decoder_start_ids=rollout.decoder_start_ids[t]).sum()
        )
    assert_close(result.loss, nll.detach() / rollout.targets.numel())


def test_the_decoder_start_id_selects_the_task():
    model = tiny_model(num_special_tokens=NUM_TASK_TOKENS)
    rollout = random_rollout(1, 2)
    hidden, _ = model.encode(rollout.inputs[0], memory=model.initial_memory(2))
    targets = rollout.targets[0]
    plain = model.token_nll(targets, hidden=hidden)
    bos = torch.full((2,), model.bos_token_id)
    assert torch.equal(model.token_nll(targets, hidden=hidden, decoder_start_ids=bos), plain)
    assert not torch.allclose(model.token_nll(targets, hidden=hidden, decoder_start_ids=bos + RECALL), plain)
    assert model.decode(targets, hidden=hidden).shape[-1] == VOCAB_SIZE
    with pytest.raises(InputError, match="decoder_start_ids holds token id 15; valid ids are 0 to 14"):
        model.token_nll(targets, hidden=hidden, decoder_start_ids=bos + 4)
    with pytest.raises(InputError, match="segment holds token id 12; valid ids are 0 to 11"):
        tiny_model().encode(bos[:, None] + 1, memory=model.initial_memory(2))


def test_mistakes_are_refused():
    with pytest.raises(InputError, match="must be at least 0 and add up to 1"):
        MultitaskConfig(continuation=0.6, infilling=0.6)
    with pytest.raises(InputError, match="must be at least 0 and add up to 1"):
        MultitaskConfig(continuation=1.1, infilling=-0.2)
    with pytest.raises(InputError, match=r"masked_fraction \(0.0\)"):
        MultitaskConfig(masked_fraction=0.0)
    with pytest.raises(InputError, match=r"mean_span \(0.0\)"):
        MultitaskConfig(mean_span=0.0)
    with pytest.raises(InputError, match="data.multitask needs model_type 'memformer'"):
        RunConfig(model_type="lstm", model=LSTMConfig(), data=DataConfig(multitask=MultitaskConfig()))
    with pytest.raises(InputError, match=r"num_special_tokens \(3\) must be 0 if adaptive_cutoffs are set"):
        tiny_model(num_special_tokens=3, adaptive_cutoffs=(4, 8))


def test_models_that_predict_from_states_alone_refuse_decoder_start_ids():
    model = tiny_baseline("transformer-xl")
    with pytest.raises(InputError, match="it cannot be shifted"):
        backpropagate(model, with_decoder_start_ids(random_rollout(2, 3, resets=True)))


@pytest.mark.parametrize(("mean", "fewest", "most"), [(0.01, 80, 100), (20, 1, 12)])
def test_masked_spans_have_the_mean_of_the_config(mean, fewest, most):
    """100 of 2,000 tokens are masked, in single tokens or in some five spans."""
    tasks = MultitaskConfig(masked_fraction=0.05, mean_span=mean)
    masked = mask_spans(np.zeros(2000, np.int64), tasks, mask_token_id=9, generator=np.random.default_rng(0))
    assert fewest <= (masked == 9).sum() <= most
    assert (masked == 0).sum() == 1900
