"""Too little memory for CUDA graphs: training goes on without them, and what was allocated for them is free."""

import gc
import weakref

import pytest
import torch

from memformer import backpropagate
from memformer.training import engine as engine_module
from memformer.training import recorded_replay
from memformer.training.engine import MOST_CHANGES_IN_A_ROW, ReplayEngine
from memformer.training.gradients import Gradients
from memformer.utils.cuda_graphs import CannotRecord, out_of_memory_ends_recording
from tests.helpers import StandInPool, assert_close, random_rollout, tiny_model
from tests.training.gradients import assert_same_gradients, by_engine, gradients, gradients_of


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("out of memory")


class NoMemory(StandInPool):
    """One recording finds too little memory, and the error holds what was allocated until then; others cannot be."""

    def __init__(self, at):
        super().__init__(at=at)

    def record(self, work, *, before):
        del work, before
        self.num_records += 1
        if self.num_records < self.at:
            raise CannotRecord("it waits")
        with out_of_memory_ends_recording():
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("at", [1, 2])
def test_what_was_allocated_for_recording_is_free_when_it_failed_for_too_little_memory(at, monkeypatch):
    model, rollout = tiny_model(), random_rollout(2, 2)
    engine = ReplayEngine(model, records=False)
    monkeypatch.setattr(engine, "_new_pool", lambda: NoMemory(at))
    made, alive = [], []

    class Noted(recorded_replay.RecordedReplay):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(weakref.ref(self))

    def without_engine(*args, **options):
        alive.extend(reference() for reference in made)
        return backpropagate(*args, **options)

    monkeypatch.setattr(engine_module, "RecordedReplay", Noted)
    monkeypatch.setattr(engine_module, "backpropagate", without_engine)
    expected = gradients(model, rollout, None, "bptt")
    gc.disable()
    try:
        assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)
    finally:
        gc.enable()
    assert alive == [None]
    assert engine._gradients is engine._pool is None


@pytest.mark.parametrize(
    ("owner", "name"), [(Gradients, "__init__"), (Gradients, "copy"), (recorded_replay, "Randomness")]
)
def test_too_little_memory_before_recording_begins_ends_it_as_well(owner, name, monkeypatch):
    model, rollout, said = tiny_model(), random_rollout(2, 2), []
    engine = ReplayEngine(model, records=False, say=said.append)

    expected = gradients(model, rollout, None, "bptt")
    monkeypatch.setattr(owner, name, out_of_memory)
    assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)
    assert said == ["recording CUDA graphs failed; training goes on without them: out of memory"]


@pytest.mark.parametrize("reason", ["memory", "changes"])
def test_gradients_of_earlier_rollouts_stay_when_graphs_are_given_up(reason, monkeypatch):
    """An update may add the gradients of several rollouts; the second of these finds no memory for its shape."""
    model, rollouts = tiny_model(), [random_rollout(2, 2), random_rollout(2, 3)]
    for rollout in rollouts:
        backpropagate(model, rollout, method="bptt")
    expected = gradients_of(model)
    model.zero_grad()
    engine = ReplayEngine(model, records=False)
    engine.backpropagate(rollouts[0])
    if reason == "memory":
        monkeypatch.setattr(recorded_replay, "Randomness", out_of_memory)
    else:
        engine._changes_in_a_row = MOST_CHANGES_IN_A_ROW
        model.register_forward_hook(lambda *_: None)
    engine.backpropagate(rollouts[1])
    assert engine._has_failed
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name])
