"""Replay of a classifier equals back-propagation through time, with labels at the end or at every segment."""

import dataclasses

import pytest
import torch

from memformer import InputError, Rollout, backpropagate
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close
from tests.models.classifiers import CLASSIFIERS, NUM_LABELS, SOME, documents_of, tiny_classifier
from tests.training.gradients import (
    assert_gradients,
    assert_same_gradients,
    by_engine,
    gradients,
    gradients_of,
    penalty,
)


def packed_rollout(num_timesteps=4, batch_size=3, *, seed=1):
    """Return a rollout with resets, padding, an empty timestep and labels at any timestep with tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_timesteps, batch_size)
    lengths = torch.randint(0, SEGMENT_LENGTH + 1, shape, generator=generator)
    lengths[0, 0], lengths[-1, 1] = 1, 0
    has_label = (torch.rand(shape, generator=generator) < 0.6) & (lengths > 0)
    has_label[0, 0] = True
    return Rollout(
        inputs=torch.randint(0, VOCAB_SIZE + 1, (*shape, SEGMENT_LENGTH), generator=generator),
        targets=torch.randint(0, NUM_LABELS, (*shape, 1), generator=generator),
        reset=torch.rand(shape, generator=generator) < 0.3,
        input_padding=torch.arange(SEGMENT_LENGTH) >= lengths[..., None],
        target_padding=~has_label[..., None],
    )


def by_hand(model, rollout, memory):
    """Compute the gradients row by row and without padding, without the package's training code."""
    model.zero_grad()
    entering, nll, count = memory.detach().clone().requires_grad_(), 0.0, 0
    for b in range(rollout.batch_size):
        row = entering[b : b + 1]
        for t in range(rollout.num_timesteps):
            if rollout.reset[t, b]:
                row = model.initial_memory(1)
            tokens = rollout.inputs[t, b][~rollout.input_padding[t, b]]
            if not len(tokens):
                continue
            hidden, row = model.encode(tokens[None], memory=row)
            label = rollout.targets[t, b]
            if not rollout.target_padding[t, b, 0]:
                nll = nll - model.decode(label[None], hidden=hidden).log_softmax(-1)[0, 0, label[0]]
                count += 1
    (nll / count).backward()
    return (nll / count).detach(), count, entering.grad, gradients_of(model)


def used_memory(model, rows):
    memory = model.initial_memory(rows).detach()
    return memory + 0.1 * torch.randn_like(memory)


@pytest.mark.parametrize("rollout_length", [1, 2])
def test_replay_of_short_rollouts_equals_bptt(rollout_length):
    assert_all_methods_agree({}, rollout_length)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_replay_and_checkpoint_equal_bptt(name):
    assert_all_methods_agree(CLASSIFIERS[name], 3)


def assert_all_methods_agree(options, rollout_length):
    model = tiny_classifier(dropout=0.2, **options)
    rollout, memory = packed_rollout(rollout_length), used_memory(model, 3)
    expected, *runs = [
        gradients(model, rollout, memory, method, readout_timesteps=2) for method in ("bptt", "checkpoint", "replay")
    ]
    for run in runs:
        assert_same_gradients(run, expected)
        assert run[2] == expected[2], "the random generator must be left where the forward pass left it"


@pytest.mark.parametrize("name", SOME)
def test_replay_equals_a_loop_over_rows_written_by_hand(name):
    model = tiny_classifier(**SOME[name])
    rollout, memory = packed_rollout(), used_memory(model, 3)
    loss, count, memory_grad, expected = by_hand(model, rollout, memory)
    result, grads, _ = gradients(model, rollout, memory, "replay", readout_timesteps=2)
    assert result.num_tokens == count
    assert_close(result.loss, loss)
    if memory.numel():
        assert_close(result.memory_grad, memory_grad)
    assert_gradients(grads, expected)


@pytest.mark.parametrize("name", ["default", "segments, memory"])
def test_the_engine_computes_the_same(name):
    model = tiny_classifier(dropout=0.2, **CLASSIFIERS[name])
    rollout, memory = packed_rollout(), used_memory(model, 3)
    expected = gradients(model, rollout, memory, "bptt")
    assert_same_gradients(by_engine(model, rollout, memory), expected)


def test_a_write_penalty_is_replayed():
    model = tiny_classifier(dropout=0.2, write_normalizer="entmax15")
    rollout, memory = packed_rollout(), used_memory(model, 3)
    free, *runs = [
        gradients(model, rollout, memory, method, hooks=penalty(weight))
        for method, weight in (("bptt", 0.0), ("bptt", 0.5), ("replay", 0.5))
    ]
    assert_same_gradients(runs[1], runs[0])
    assert (runs[0][1]["memory_writer.key.weight"] - free[1]["memory_writer.key.weight"]).norm() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "last", "memory"])
def test_a_label_at_the_end_has_a_gradient_in_the_first_segment(pooling):
    model = tiny_classifier(pooling=pooling)
    documents, labels = documents_of(model, lengths=(4 * SEGMENT_LENGTH,))
    result = backpropagate(model, model.make_rollout(documents, labels))
    assert result.num_tokens == 1
    assert (result.memory_grad_norms[1:] > 0).all()


def test_a_document_in_two_rollouts_has_the_labels_of_one():
    model = tiny_classifier()
    rollout = model.make_rollout(*documents_of(model))
    whole = backpropagate(model, rollout)
    first = backpropagate(model, rollout[:2])
    second = backpropagate(model, rollout[2:], memory=first.memory)
    assert_close(first.loss * first.num_tokens + second.loss * second.num_tokens, whole.loss * whole.num_tokens)
    assert_close(second.memory, whole.memory)


def test_a_label_without_a_token_is_refused():
    model = tiny_classifier()
    rollout = packed_rollout()
    everywhere = dataclasses.replace(rollout, target_padding=None)
    with pytest.raises(InputError, match=r"timestep \d of row \d has a label but no input token"):
        backpropagate(model, everywhere)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.full((4, 3, 1), 3)}, "label 3 is out of range; valid labels are 0 to 2"),
        ({"targets": torch.full((4, 3, 1), -100)}, "label -100 is out of range"),
        (
            {"targets": torch.zeros((4, 3, 2), dtype=torch.int64), "target_padding": None},
            r"labels \(targets\) have shape \(4, 3, 2\); the last dimension must be 1",
        ),
        (
            {"decoder_start_ids": torch.zeros((4, 3), dtype=torch.int64)},
            "decoder_start_ids are given, but a MemformerForSequenceClassification does not support them",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        backpropagate(tiny_classifier(), dataclasses.replace(packed_rollout(), **changes))
