"""Sessions that record reading and decoding equal others; here nothing is recorded, but the same code runs."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from memformer import Session
from memformer.generation import contexts, decoding, recording
from memformer.utils.cuda_graphs import CannotRecord
from tests.generation.sessions import random_tokens
from tests.helpers import SEGMENT_LENGTH, StandInPool, assert_close, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline


@pytest.fixture
def device(monkeypatch):
    """A stand-in for a device: whether it can record, and the pools that were made on it."""
    device = SimpleNamespace(can_record=False, pools=[], error=None)

    def make_pool(_):
        device.pools.append(StandInPool(device.error, at=device.error and 1))
        return device.pools[-1]

    for module in (contexts, decoding):
        monkeypatch.setattr(module, "can_record", lambda _: device.can_record)
    monkeypatch.setattr(recording, "GraphPool", make_pool)
    return device


@contextlib.contextmanager
def recorded_on(device):
    device.can_record = True
    yield
    device.can_record = False


def assert_equal_sessions(model, device, change=lambda session: None):
    """Compare a recorded session with another one: rows of one length, then of two, token by token."""
    recorded, other = (Session(copy.deepcopy(model), batch_size=2) for _ in range(2))
    first = (4 * SEGMENT_LENGTH, 4 * SEGMENT_LENGTH), (SEGMENT_LENGTH + 2, 1)
    for number, lengths in enumerate((*first, *[(1, 1)] * (4 * SEGMENT_LENGTH))):
        rows = [random_tokens(length, seed=2 * number + row) for row, length in enumerate(lengths)]
        logits = []
        for session, context in ((recorded, recorded_on(device)), (other, contextlib.nullcontext())):
            with context:
                session.feed(rows)
                if number == 2 * SEGMENT_LENGTH:
                    session.next_token_logits()
                    change(session)
                logits.append(session.next_token_logits())
        assert_close(*logits)
    assert_close(recorded.memory, other.memory)
    with recorded_on(device):
        tokens = recorded.generate(SEGMENT_LENGTH + 2, temperature=0)
    assert tokens == other.generate(SEGMENT_LENGTH + 2, temperature=0)


def test_recorded_sessions_equal_others(device, variant):
    assert_equal_sessions(tiny_model(**variant), device)
    # Reading of a segment; its past and the decoding step.
    assert {pool.num_records for pool in device.pools} == {1, 2}


@pytest.mark.parametrize("name", BASELINES)
def test_recorded_sessions_of_baselines_equal_others(device, name):
    assert_equal_sessions(tiny_baseline(name), device)
    assert [pool.num_records for pool in device.pools] == [1]


def reorder(session):
    session.reorder([1, 1])


def select(session):
    session.select_rows([1, 0, 1])
    session.select_rows([2, 1])


def change_weights(session):
    with torch.no_grad():
        for weight in session.model.parameters():
            weight.mul_(1.01)


def move_weights(session):
    for weight in session.model.parameters():
        weight.data = 1.01 * weight.data


@pytest.mark.parametrize(
    # A graph works on the rows and on the places of the weights with which it was recorded.
    ("change", "num_recorded_again"),
    [(reorder, 0), (change_weights, 0), (select, 1), (move_weights, 1)],
)
def test_changes_between_tokens_are_noticed(device, change, num_recorded_again):
    assert_equal_sessions(tiny_model(), device, change)
    # Reading is recorded again as soon as all rows are read at once again, which does not happen here.
    steps = [pool for pool in device.pools if pool.num_records == 2]
    assert len(steps) == 1 + num_recorded_again


def test_short_answers_are_not_recorded(device):
    session = Session(tiny_model())
    session.feed(random_tokens(SEGMENT_LENGTH))
    with recorded_on(device):
        session.generate(SEGMENT_LENGTH - 1)
    assert device.pools == []


def test_what_cannot_be_recorded_runs_operation_by_operation(device, capsys):
    device.error = CannotRecord
    recording._said.clear()
    assert_equal_sessions(tiny_model(), device)
    sentences = capsys.readouterr().err.splitlines()
    assert len(sentences) == len(set(sentences)) == 2  # reading a segment, and the past of one
    assert all("cannot become a CUDA graph and runs operation by operation" in sentence for sentence in sentences)
