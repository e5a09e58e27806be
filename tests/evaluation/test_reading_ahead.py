"""Reading ahead gives the memory of reading one segment after another, with fewer steps."""

from itertools import pairwise

import pytest
import torch

from memformer.evaluation.reading_ahead import AheadReader
from memformer.models.presets import preset_fields
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model

ROWS, SEGMENTS = 3, 40
RECALL = preset_fields("recall")
SPARSE = {"write_normalizer": "sparsemax", "forgetting_when_written": True}


def recall_model(temperature, *, seed=0, **fields):
    """A model whose slots take a token the more seldom, the lower the temperature is."""
    model = tiny_model(seed, **{"num_slots": 6, "write_temperature": temperature, **fields})
    model.memory_writer.query.weight.data.copy_(model.memory_writer.key.weight)
    return model


def read_one_by_one(model, segments):
    """Return the memory after every segment, first the initial one."""
    memories = [model.initial_memory(len(segments))]
    for segment in segments.unbind(dim=1):
        memories.append(model.encode(segment, memory=memories[-1])[1])
    return memories


@pytest.fixture
def segments():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB_SIZE, (ROWS, SEGMENTS, SEGMENT_LENGTH), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.3, 1.0])
@pytest.mark.parametrize(
    "fields",
    [
        RECALL,
        RECALL | {"slot_width": 8, "num_writer_heads": 2},
        RECALL | {"num_slots": 50},
        SPARSE,
        SPARSE | {"forgetting": False, "forgetting_when_written": False},
        {},
    ],
    ids=["recall", "narrow slots, two heads", "many free slots", "sparsemax", "no forgetting", "default"],
)
def test_the_memory_is_that_of_one_segment_after_another(temperature, fields, segments):
    model = recall_model(temperature, **fields)
    expected = read_one_by_one(model, segments)
    reader, memory = AheadReader(model), expected[0]
    for first, last in ((0, 1), (1, 20), (20, 39), (39, 40)):
        memory = reader.read(segments[:, first:last], memory=memory)
        assert_close(memory, expected[last])


@torch.no_grad()
def test_segments_that_are_not_written_are_read_side_by_side(segments, monkeypatch):
    model = recall_model(0.1, seed=4, **SPARSE)
    # One segment again and again is soon written no more.
    segments = torch.cat([segments[:, :10], segments[:, 10:11].expand(-1, 200, -1), segments[:, 11:]], dim=1)
    memories = read_one_by_one(model, segments)
    num_written = sum((before != after).flatten(1).any(dim=1).sum().item() for before, after in pairwise(memories))
    encoded = []
    encode = model.encode

    def counted(segment, *, memory):
        encoded.extend(segment.tolist())
        return encode(segment, memory=memory)

    monkeypatch.setattr(model, "encode", counted)
    assert_close(AheadReader(model).read(segments, memory=memories[0]), memories[-1])
    assert 0 < num_written < 50
    assert num_written <= len(encoded) < 150 < segments[..., 0].numel()


@torch.no_grad()
@pytest.mark.parametrize("fields", [RECALL, SPARSE], ids=["recall", "sparsemax"])
def test_unwritten_segments_are_counted_up_to_the_first_that_changes_the_memory(fields, segments):
    model = recall_model(0.1, **fields)
    memories = read_one_by_one(model, segments)
    found = set()
    for number, memory in enumerate(memories[:-1]):
        counts = model.count_unwritten(segments[:, number:], memory=memory)
        for row, count in enumerate(counts.tolist()):
            following = [memories[number + n + 1][row] for n in range(count)]
            assert all(torch.equal(memory[row], later) for later in following)
            if number + count < SEGMENTS:
                assert not torch.equal(memory[row], memories[number + count + 1][row])
            found.add(count)
    assert len(found) > 3


@torch.no_grad()
def test_the_numbers_of_segments_that_are_read_side_by_side_are_few(monkeypatch):
    """A CPU's library keeps a program for every number, so memory would grow for as long as new ones come."""
    model = recall_model(0.1, seed=4, **SPARSE)
    segments = torch.randint(0, VOCAB_SIZE, (11, 100, SEGMENT_LENGTH), generator=torch.Generator().manual_seed(3))
    expected = read_one_by_one(model, segments)[-1]
    shapes = set()
    count = model.count_unwritten
    monkeypatch.setattr(
        model, "count_unwritten", lambda s, *, memory: shapes.add(s.shape[:2]) or count(s, memory=memory)
    )
    assert_close(AheadReader(model).read(segments, memory=model.initial_memory(11)), expected)
    assert {1, 4, 11} <= {rows for rows, _ in shapes} <= {1, 2, 4, 8, 11}
    assert {2, 4} <= {width for _, width in shapes} <= {2, 4, 8, 16, 32, 64}


@torch.no_grad()
@pytest.mark.parametrize("num_used", [[0, 0, 0], [3, 0, 14], [15, 2, 1], [16, 17, 1], [46, 47, 48], [50, 50, 50]])
def test_free_slots_are_read_as_one(num_used, segments, monkeypatch):
    model = recall_model(0.3, **RECALL | {"num_slots": 50})
    memory = model.initial_memory(ROWS).clone()
    for row, count in enumerate(num_used):
        places = torch.randperm(50)[:count]
        memory[row, places] = memory[row, places].roll(1, dims=-1) + torch.randn(count, memory.shape[-1])
    read = []
    reader = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda *args, **options: read.append(reader(*args, **options)) or read[-1]
    )
    numbers_of_slots = []
    may_write = model.memory_writer.may_write
    monkeypatch.setattr(
        model.memory_writer,
        "may_write",
        lambda m, **options: numbers_of_slots.append(m.shape[1]) or may_write(m, **options),
    )
    model.count_unwritten(segments[:, :4], memory=memory)
    size = 16 * (max(num_used) // 16 + 1)
    assert numbers_of_slots == [size if size < 50 else 50]
    for number in range(4):
        hidden = model.encoder(model._embed(segments[:, number]), memory=memory, padding_mask=None)
        assert_close(read[0].view(ROWS, 4, *hidden.shape[1:])[:, number], hidden)


@torch.no_grad()
def test_the_memory_that_is_passed_is_not_changed(segments):
    model = recall_model(0.3, **RECALL)
    memory = model.initial_memory(ROWS).clone()
    before = memory.clone()
    AheadReader(model).read(segments, memory=memory)
    assert torch.equal(memory, before)


@pytest.mark.parametrize(
    ("fields", "keeps"),
    [
        ({}, False),
        (RECALL, True),
        (RECALL | {"write_normalizer": "softmax"}, False),
        (RECALL | {"forgetting_when_written": False}, False),
        ({"write_normalizer": "entmax15", "forgetting": False}, True),
    ],
)
def test_a_memory_is_kept_where_writes_are_sparse_and_only_they_forget(fields, keeps):
    assert tiny_model(**fields).keeps_unwritten_segments is keeps


def test_a_model_without_slots_has_nothing_to_keep():
    assert tiny_model(num_slots=0).keeps_unwritten_segments is False
