"""Half-lives: the formula follows memory normalization, and equals what is measured in a slot that is not written."""

import math

import numpy as np
import pytest
import torch

from memformer.evaluation.half_life import (
    LifetimeProbe,
    _written_alike,
    computed_half_lives,
    forgetting_norms,
    half_life,
    time_of_half,
)
from memformer.evaluation.inspection_parts import Lifetimes
from memformer.nn.attention import AttentionRecord
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, assert_close, tiny_model
from tests.models.baselines import tiny_baseline, used_memory

WIDTH = 16


def counted_half_life(speed, angle):
    """Count timesteps of memory normalization itself, with vectors."""
    model = tiny_model(num_slots=1)
    normalization = model.memory_normalization
    normalization.log_speed.data.fill_(math.log(speed))
    direction = normalization.forgetting_vectors().detach()[0] / (speed * math.sqrt(WIDTH))
    other = torch.randn(WIDTH, dtype=torch.float64)
    other -= (other @ direction) * direction
    other /= other.norm()
    start = memory = math.sqrt(WIDTH) * (math.cos(angle) * direction + math.sin(angle) * other)[None, None]
    initial = model.initial_memory(1)
    value, shares = (start - initial).flatten(), [1.0]
    with torch.no_grad():
        while shares[-1] > 0.5:
            memory = normalization(memory, written=torch.zeros(1, 2, 1, 1))
            shares.append(((memory - initial).flatten() @ value / value.square().sum()).item())
    return time_of_half(np.array(shares))


@pytest.mark.parametrize(("speed", "relative"), [(3.0, 1e-12), (0.3, 1e-12), (0.02, 1e-12), (9e-4, 1e-6)])
@pytest.mark.parametrize("angle", [0.1, math.pi / 2, 2.5])
def test_the_half_life_follows_memory_normalization(speed, relative, angle):
    assert half_life(speed, angle) == pytest.approx(counted_half_life(speed, angle), rel=relative)


def test_slow_slots_are_neither_counted_nor_infinite():
    assert half_life(1e-7) == pytest.approx(math.log(math.tan(math.pi / 4) / math.tan(math.pi / 8)) / 1e-7, rel=1e-6)
    assert half_life(0.000999999) == pytest.approx(half_life(0.001), rel=3e-6)
    assert half_life(0.0) == math.inf


@pytest.mark.parametrize(
    ("options", "is_infinite"),
    [({}, False), ({"forgetting": False}, True), ({"forgetting_when_written": True}, True)],
)
def test_slots_that_do_not_forget_live_for_ever(options, is_infinite):
    model = tiny_model(forgetting_speeds=(0.3, 0.01), **options)
    half_lives = computed_half_lives(model)
    assert half_lives.shape == (5,)
    assert np.isinf(half_lives).all() == is_infinite
    if not is_infinite:
        assert (np.diff(half_lives) > 0).all()
    norms = (
        [0.0] * 5 if "forgetting" in options else model.memory_normalization.forgetting_vectors().norm(dim=-1).tolist()
    )
    assert forgetting_norms(model) == pytest.approx(norms)


def test_exchangeable_slots_share_a_forgetting_vector():
    model = tiny_model(exchangeable_slots=True, forgetting_speeds=(0.1, 0.1), write_competition=True)
    assert computed_half_lives(model) == pytest.approx(5 * [half_life(0.1)])


def model_that_writes_nothing(**options):
    """Return a model whose slots attend to themselves alone, unless a token equals the slot."""
    options = {"forgetting_speeds": (0.3, 0.03), **options}
    model = tiny_model(num_writer_heads=1, write_normalizer="sparsemax", **options)
    with torch.no_grad():
        for projection in (model.memory_writer.query, model.memory_writer.key):
            torch.nn.init.eye_(projection.weight)
            projection.weight *= 10
    return model


@torch.no_grad()
def test_the_measured_half_life_of_a_slot_that_is_not_written_is_the_computed_one():
    model = model_that_writes_nothing()
    memory = math.sqrt(WIDTH) * torch.nn.functional.normalize(torch.randn(1, 5, WIDTH, dtype=torch.float64), dim=-1)
    initial = model.initial_memory(1)
    angles = torch.cosine_similarity(memory, initial, dim=-1)[0].arccos()
    speeds = forgetting_norms(model) / math.sqrt(WIDTH)
    slots = np.array([0, 2, 3, 4])
    probe = LifetimeProbe(model, memory, slots)
    for _ in range(60):
        segment = torch.randint(0, VOCAB_SIZE, (1, SEGMENT_LENGTH))
        record = AttentionRecord()
        memory = model.encode(segment, memory=memory, attention=record)[1]
        probe.read(segment, None, next_memory=memory, record=record)
    assert probe.num_timesteps == 60
    measured = [time_of_half(shares) for shares in probe.shares().T]
    computed = [half_life(float(speeds[slot]), float(angles[slot])) for slot in slots]
    assert measured == pytest.approx(computed, rel=1e-9)
    assert 1 < measured[0] < 10 < measured[-1] < 60


@torch.no_grad()
def test_a_slot_that_keeps_its_value_has_all_of_it_left_beside_slots_that_compete():
    """An empty slot in its place would take the next token; that is no loss of the value."""
    model = model_that_writes_nothing(
        write_competition=True,
        exchangeable_slots=True,
        forgetting_when_written=True,
        forgetting_speeds=(0.3, 0.3),
        free_slot_bias=1e4,
    )
    initial = model.initial_memory(1)
    memory = math.sqrt(WIDTH) * torch.nn.functional.normalize(torch.randn(1, 5, WIDTH, dtype=torch.float64), dim=-1)
    memory *= -torch.cosine_similarity(memory, initial, dim=-1).sign()[..., None]  # unlike a slot that holds nothing
    memory[:, 3:] = initial[:, 3:]
    probe, start = LifetimeProbe(model, memory, np.arange(3)), memory
    for _ in range(6):
        segment, record = torch.randint(0, VOCAB_SIZE, (1, SEGMENT_LENGTH)), AttentionRecord()
        assert not torch.equal(model.encode(segment, memory=initial)[1][0, :3], initial[0, :3])
        memory = model.encode(segment, memory=memory, attention=record)[1]
        probe.read(segment, None, next_memory=memory, record=record)
    assert torch.equal(memory[0, :3], start[0, :3])
    assert not torch.equal(memory[0, 3:], start[0, 3:])
    assert (probe.shares() == 1).all()


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if changes.get("num_slots") != 0])
@torch.no_grad()
def test_a_memory_that_is_written_alike_is_the_next_memory(name):
    model = tiny_model(**VARIANTS[name])
    memory, record = model.initial_memory(2), AttentionRecord()
    for _ in range(3):
        segment, before = torch.randint(0, VOCAB_SIZE, (2, SEGMENT_LENGTH)), memory
        memory = model.encode(segment, memory=memory, attention=record)[1]
        assert_close(_written_alike(model, before, record), memory)


def test_what_is_left_in_a_recurrent_memory_transformer_is_found_by_reading_without_it():
    """Beside the memory, one for each slot is read in which that slot began in its initial state."""
    model, slots = tiny_baseline("recurrent memory"), [0, 2]
    memory = used_memory(model, 1)
    probe = LifetimeProbe(model, memory, np.array(slots))
    without = {slot: memory.clone() for slot in slots}
    for slot in slots:
        without[slot][:, slot] = model.initial_memory(1)[:, slot]
    values = {slot: (memory - without[slot])[:, slot].flatten() for slot in slots}
    expected = {slot: [1.0] for slot in slots}
    with torch.no_grad():
        for segment in torch.randint(VOCAB_SIZE, (4, 1, SEGMENT_LENGTH)):
            record = AttentionRecord()
            _, memory = model.encode(segment, memory=memory, attention=record)
            probe.read(segment, None, next_memory=memory, record=record)
            for slot in slots:
                without[slot] = model.encode(segment, memory=without[slot])[1]
                left = (memory - without[slot])[:, slot].flatten()
                expected[slot].append(float(left @ values[slot] / values[slot].square().sum()))
    for column, slot in enumerate(slots):
        assert probe.shares()[:, column] == pytest.approx(expected[slot], rel=1e-6)


@torch.no_grad()
def test_a_segment_of_padding_alone_changes_no_share():
    model = tiny_model(forgetting_speeds=(0.3, 0.03))
    memory = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    probe = LifetimeProbe(model, memory, np.arange(5))
    segment, record = torch.zeros(1, SEGMENT_LENGTH, dtype=torch.int64), AttentionRecord()
    padding = torch.ones(1, SEGMENT_LENGTH, dtype=torch.bool)
    next_memory = model.encode(segment, memory=memory, padding_mask=padding, attention=record)[1]
    probe.read(segment, padding, next_memory=next_memory, record=record)
    assert (probe.shares()[1] == 1).all()


@torch.no_grad()
def test_a_slot_in_its_initial_state_holds_no_value():
    model = tiny_model()
    memory = model.initial_memory(1).clone()
    memory[0, 1] = torch.randn(WIDTH)
    probe = LifetimeProbe(model, memory, np.arange(5))
    segment = torch.randint(0, VOCAB_SIZE, (1, SEGMENT_LENGTH))
    record = AttentionRecord()
    next_memory = model.encode(segment, memory=memory, attention=record)[1]
    probe.read(segment, None, next_memory=next_memory, record=record)
    assert np.isnan(probe.shares()).all(axis=0).tolist() == [True, False, True, True, True]


def test_the_time_of_half_is_interpolated():
    assert time_of_half(np.array([1.0, 0.75, 0.25])) == 1.5
    assert time_of_half(np.array([1.0, 0.5])) == 1.0
    assert time_of_half(np.array([1.0, 0.9])) == math.inf


def read_timesteps(lifetimes, model, timesteps, *, memory):
    """Read a random segment in each timestep, counted in its document."""
    for timestep in timesteps:
        record, segment = AttentionRecord(), torch.randint(VOCAB_SIZE, (1, SEGMENT_LENGTH))
        _, after = model.encode(segment, memory=memory, attention=record)
        lifetimes.read(segment, None, memory=memory, next_memory=after, record=record, timestep=timestep)
        memory = after


@torch.no_grad()
def test_a_value_that_outlives_the_probe_has_a_lower_bound():
    model = model_that_writes_nothing(forgetting_speeds=(1e-4, 1e-4))
    lifetimes = Lifetimes(model, num_probes=1, probe_timesteps=4, max_slots=5)
    memory = 4 * torch.nn.functional.normalize(torch.randn(1, 5, 16, dtype=torch.float64), dim=-1)
    read_timesteps(lifetimes, model, range(4, 9), memory=memory)
    assert [lifetimes.of(slot)[:2] for slot in range(5)] == [(None, 4.0)] * 5


# The first begins at the timestep 4 of a document, and each of the others at twice the timestep where one ended.
@pytest.mark.parametrize(
    ("lengths", "expected"), [([4], 0), ([5], 1), ([14], 1), ([15], 2), ([34], 2), ([35], 3), ([6, 6], 1), ([8, 20], 2)]
)
@torch.no_grad()
def test_probes_begin_farther_and_farther_apart(lengths, expected):
    model = tiny_model()
    lifetimes = Lifetimes(model, num_probes=9, probe_timesteps=3, max_slots=5)
    timesteps = (timestep for length in lengths for timestep in range(length))
    read_timesteps(lifetimes, model, timesteps, memory=model.initial_memory(1))
    assert lifetimes.num_started == expected
