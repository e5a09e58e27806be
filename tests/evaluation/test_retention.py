"""How long a memory holds is measured exactly: oracles forget on time; evaluation and sessions find the same."""

import itertools
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, Memformer, Session, evaluate
from memformer.data import RecallConfig, corpus_from_arrays, load_tokenizer, make_task, save_tokenizer
from memformer.evaluation.document_retention import measure_documents
from memformer.evaluation.recall import measure_recall
from memformer.models import RecurrentModel
from tests.cli.calls import call, call_json, make_text, refused
from tests.evaluation.test_likelihood import documents
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model

LENGTHS = st.lists(st.integers(1, 7 * SEGMENT_LENGTH), min_size=1, max_size=5)


class Oracle(RecurrentModel):
    """Remembers the last value of each key until the fact is `limit` segments old, and answers what it remembers.

    Its memory is one row for each key: the value's id, 0 for none, and the segments since it was told.
    """

    segment_length = 16

    def __init__(self, task, limit, *, refreshed_by_questions=False):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))  # says on which device the model is
        self.task = task
        self.limit = limit
        self.refreshed_by_questions = refreshed_by_questions
        self.segments = []

    @property
    def vocab_size(self):
        return self.task.tokenizer.vocab_size

    @property
    def bos_token_id(self):
        return self.vocab_size

    @property
    def memory_shape(self):
        return self.vocab_size, 2

    def initial_memory(self, batch_size):
        return torch.zeros(batch_size, *self.memory_shape)

    def encode(self, segment, *, memory, padding_mask=None):
        self.segments.append(segment)
        memory = memory + torch.tensor([0.0, 1.0])
        memory[memory[..., 1] > self.limit] = 0
        answers = torch.zeros(len(segment), 1, 1)
        values, keys = ({int(id) for id in ids} for ids in (self.task._values, self.task._keys))
        for row, tokens in enumerate(segment.tolist()):
            for token, following in itertools.pairwise(tokens):
                if token in keys and following in values:
                    memory[row, token] = torch.tensor([following, 0.0])
            if tokens[-1] in keys:
                answers[row] = memory[row, tokens[-1], 0]
                if self.refreshed_by_questions:
                    memory[row, tokens[-1], 1] = 0
        return answers, memory

    def decode(self, targets, *, hidden, hidden_padding_mask=None):
        return torch.nn.functional.one_hot(hidden[:, :1, 0].long(), self.vocab_size).float()


def random_model(config, seed=0):
    """A Memformer that has learnt nothing, for the words of a task."""
    return tiny_model(seed, vocab_size=make_task(config).tokenizer.vocab_size)


class Recorded(RecurrentModel):
    """A model with a list of what it encoded, each with the targets and logits if it was decoded, else None."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.segments = []

    vocab_size = property(lambda self: self.model.vocab_size)
    bos_token_id = property(lambda self: self.model.bos_token_id)
    segment_length = property(lambda self: self.model.segment_length)
    memory_shape = property(lambda self: self.model.memory_shape)

    def initial_memory(self, batch_size):
        return self.model.initial_memory(batch_size)

    def encode(self, segment, *, memory, padding_mask=None):
        self.segments.append((segment, None))
        return self.model.encode(segment, memory=memory, padding_mask=padding_mask)

    def decode(self, targets, *, hidden, hidden_padding_mask=None):
        logits = self.model.decode(targets, hidden=hidden, hidden_padding_mask=hidden_padding_mask)
        self.segments[-1] = self.segments[-1][0], (targets, logits)
        return logits


def accuracies(model, config, distances, **options):
    options = {"num_facts": config.num_facts[1], "num_episodes": 5, **options}
    recall = measure_recall(model, model.task, config, distances=distances, **options)
    return {point.distance: point.accuracy for point in recall.points}


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("task", ["fact", "associative", "rewrite"])
def test_a_memory_that_forgets_on_time_answers_exactly_up_to_then(task, limit):
    num_facts = 1 if task == "fact" else 4
    config = RecallConfig(task=task, num_facts=(num_facts, num_facts), facts_per_segment=(num_facts, num_facts))
    measured = accuracies(Oracle(make_task(config), limit), config, range(1, 12))
    assert measured == {distance: float(distance <= limit) for distance in range(1, 12)}


@settings(max_examples=20, deadline=None)
@given(num_facts=st.integers(1, 6), facts_per_segment=st.integers(1, 3), limit=st.integers(1, 8))
def test_distances_count_from_the_last_fact(num_facts, facts_per_segment, limit):
    config = RecallConfig(
        task="associative",
        num_facts=(1, num_facts),
        facts_per_segment=(facts_per_segment, facts_per_segment),
        num_keys=num_facts,
    )
    model = Oracle(make_task(config), limit)
    num_segments = math.ceil(num_facts / facts_per_segment)
    share = math.ceil(num_facts / num_segments)
    # Facts of earlier segments are older by the segments between.
    extra_ages = [num_segments - 1 - index // share for index in range(num_facts)]
    measured = accuracies(model, config, range(1, 10), questions_per_episode=num_facts)
    for distance, accuracy in measured.items():
        assert accuracy == pytest.approx(np.mean([distance + extra <= limit for extra in extra_ages]))


def test_distance_1_is_the_segment_right_after_the_last_fact():
    config = RecallConfig(task="associative", num_facts=(3, 3), max_fact_gap=4, num_keys=3)
    model = Oracle(make_task(config), 100)
    (point,) = measure_recall(model, model.task, config, distances=[1], num_facts=3, questions_per_episode=1).points
    *_, last_fact, question, with_memory_erased = model.segments
    assert torch.equal(question, with_memory_erased)
    keys = set(model.task._keys.tolist())
    assert all(sum(token in keys for token in row) == 1 and row[-1] not in keys for row in last_fact.tolist())
    assert all(row[-1] in keys for row in question.tolist())
    # The first of the segments is [BOS] alone.
    assert point.num_tokens == (len(model.segments) - 2) * model.segment_length


@pytest.mark.parametrize("distances", [[6], [1, 6], [*range(1, 7)], [6, 3, 3, 1, 4]])
def test_questions_leave_no_trace(distances):
    config = RecallConfig(task="associative", num_facts=(2, 2), facts_per_segment=(2, 2))
    model = Oracle(make_task(config), 5, refreshed_by_questions=True)
    measured = accuracies(model, config, distances)
    assert measured == {distance: float(distance <= 5) for distance in sorted(set(distances))}


def test_what_is_found_at_a_distance_does_not_depend_on_the_others():
    config = RecallConfig(task="rewrite", num_facts=(5, 5), num_keys=3)

    def read(**options):
        recorded = Recorded(random_model(config))
        points = measure_recall(recorded, make_task(config), config, num_facts=5, num_episodes=3, **options).points
        walk = [segment for segment, decoded in recorded.segments if decoded is None]
        asked = [(segment, *decoded) for segment, decoded in recorded.segments if decoded is not None]
        return points, torch.stack(walk[1:]), [torch.stack(tensors) for tensors in zip(*asked, strict=True)]

    points, walk, asked = read(distances=range(1, 9))
    few_points, few_walk, few_asked = read(distances=[5, 8])
    assert few_points == [points[4], points[7]]
    assert torch.equal(few_walk, walk)
    # Up to three keys, so as many turns of questions at each distance.
    turns = len(asked[0]) // 8
    for few_tensors, tensors in zip(few_asked, asked, strict=True):
        assert torch.equal(few_tensors, torch.cat([tensors[4 * turns : 5 * turns], tensors[7 * turns :]]))
    _, other_walk, _ = read(distances=range(1, 9), seed=1)
    assert not torch.equal(other_walk, walk)


def test_a_question_counts_once():
    config = RecallConfig(task="rewrite", num_facts=(6, 6), facts_per_segment=(6, 6), num_keys=3)
    model = Oracle(make_task(config), 100)
    for questions in (1, 2, 3, 9):
        recall = measure_recall(
            model, model.task, config, distances=[1, 2], num_facts=6, num_episodes=7, questions_per_episode=questions
        )
        told = [{token for token in row if token in model.task._keys} for row in model.segments[1].tolist()]
        assert len(told) == 7
        for point in recall.points:
            assert point.num_questions == point.num_right == sum(min(questions, len(keys)) for keys in told)
            assert point.num_right_memory_erased == 0
        model.segments.clear()


@pytest.mark.parametrize(
    ("task", "num_facts", "options"),
    [
        ("fact", 1, {"num_values": 2, "num_fillers": 1}),
        ("associative", 4, {"num_keys": 4, "num_values": 2, "num_fillers": 1, "max_fact_gap": 2}),
        ("copy", 2, {"num_values": 2, "num_fillers": 1}),
    ],
)
def test_an_answer_is_right_where_a_session_generates_it(task, num_facts, options):
    config = RecallConfig(task=task, num_facts=(num_facts, num_facts), **options)
    # Of the models that have learnt nothing, one that is right now and then.
    model = random_model(config, seed=14)
    recorded = Recorded(model)
    measured = measure_recall(
        recorded, make_task(config), config, distances=[1, 2, 5], num_facts=num_facts, num_episodes=12
    )
    walk, num_right, num_right_erased, is_erased = [], {}, 0, True
    for segment, decoded in recorded.segments:
        if decoded is None:
            walk.append(segment)
            continue
        targets, logits = decoded
        is_erased = not is_erased
        if is_erased:  # the question before, once more
            hidden, _ = model.encode(segment)
            answers = model.decode(targets, hidden=hidden).argmax(dim=-1)
            num_right_erased += int((answers == targets).all(dim=-1).sum())
            continue
        session = Session(model, batch_size=12)
        # The first segment of the walk is [BOS], which a session reads by itself.
        session.feed(torch.cat([*walk[1:], segment], dim=1))
        num_tokens = session.num_tokens[0]
        assert_close(session.next_token_logits(), logits[:, 0])
        answers = torch.tensor(session.generate(targets.shape[1], temperature=0))
        num_right[num_tokens] = num_right.get(num_tokens, 0) + int((answers == targets).all(dim=-1).sum())
    assert walk[0].tolist() == [[model.bos_token_id]] * 12
    assert {point.num_tokens: point.num_right for point in measured.points} == num_right
    assert sum(point.num_right_memory_erased for point in measured.points) == num_right_erased
    assert 0 < sum(num_right.values()) < sum(point.num_questions for point in measured.points)


def test_measuring_recall_leaves_mode_and_randomness_alone():
    config = RecallConfig(task="associative", num_facts=(2, 2), num_keys=3, num_values=2, num_fillers=1)
    model = tiny_model(vocab_size=make_task(config).tokenizer.vocab_size, dropout=0.5).train()
    before = torch.get_rng_state()
    first, second = (measure_recall(model, make_task(config), config, distances=[1, 3], num_facts=2) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(point.peak_memory_bytes > 0 for point in first.points)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("fact", {"distances": [0, 4]}, r"distances \(0, 4\) must be at least 1 segment each"),
        ("fact", {"distances": []}, r"distances \(\) must be"),
        ("fact", {"num_episodes": 0}, r"num_episodes \(0\) must be at least 1"),
        ("fact", {"questions_per_episode": 0}, r"questions \(0\) must be at least 1"),
        ("fact", {"num_facts": 0}, r"num_facts \(0\) does not fit the task: "),
        ("fact", {"num_facts": 2}, r"num_facts \(2\) does not fit the task: "),
        ("associative", {"num_facts": 5}, r"num_facts \(5\) does not fit the task: .* num_keys is less"),
        ("associative", {"num_facts": 4}, r"num_facts \(4\) does not fit the task: model.segment_length \(6\)"),
        ("copy", {"num_facts": 2}, r"num_facts \(2\) does not fit the task: an answer would have 2 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(task, options, message):
    config = RecallConfig(task=task, num_keys=4 if task == "associative" else 32, facts_per_segment=(4, 4))
    with pytest.raises(InputError, match=message):
        measure_recall(random_model(config), make_task(config), config, **{"distances": [1], "num_facts": 1, **options})


def delayed_nats_by_hand(model, arrays, delay, longest_delay):
    """Nats and tokens of the targets at timestep `longest_delay` and later, with memories kept in full."""
    nats, num_tokens = 0.0, 0
    for array in arrays:
        memories, segment = [model.initial_memory(1)], torch.tensor([[model.bos_token_id]])
        for timestep, start in enumerate(range(0, len(array), SEGMENT_LENGTH)):
            hidden, _ = model.encode(segment, memory=memories[max(timestep - delay, 0)])
            memories.append(model.encode(segment, memory=memories[timestep])[1])
            segment = torch.tensor(array[None, start : start + SEGMENT_LENGTH])
            if timestep >= longest_delay:
                nats += model.token_nats(segment, hidden=hidden).sum().item()
                num_tokens += segment.shape[1]
    return nats, num_tokens


@settings(max_examples=10, deadline=None)
@given(
    lengths=LENGTHS,
    num_lanes=st.integers(1, 6),
    delays=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_delays_equal_documents_one_by_one(lengths, num_lanes, delays):
    lengths = [*lengths, 7 * SEGMENT_LENGTH]  # one that the longest delay reaches into
    model = tiny_model()
    arrays = documents(lengths)
    result = measure_documents(model, corpus_from_arrays(arrays, VOCAB_SIZE), delays=delays, num_lanes=num_lanes)
    assert list(result.delayed_nats) == sorted({0, *delays})
    for delay, nats in result.delayed_nats.items():
        with torch.no_grad():
            expected, num_tokens = delayed_nats_by_hand(model, arrays, delay, max(delays))
        assert nats == pytest.approx(expected, rel=1e-10)
        assert result.num_delayed_tokens == num_tokens


@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS)
def test_delay_0_and_erased_are_what_evaluation_finds(lengths):
    model = tiny_model()
    corpus = corpus_from_arrays(documents([SEGMENT_LENGTH, *lengths]), VOCAB_SIZE)
    expected = evaluate(model, corpus)
    result = measure_documents(model, corpus, delays=[0])
    assert result.num_delayed_tokens == corpus.num_tokens
    assert result.delayed_nats[0] == pytest.approx(expected.with_memory.nats, rel=1e-10)
    assert result.delayed_nats_memory_erased == pytest.approx(expected.memory_erased.nats, rel=1e-10)
    assert result.bits_per_byte(0) == pytest.approx(expected.with_memory.bits_per_byte)
    assert result.older_gain(0) == pytest.approx(expected.memory_gain)


def test_a_delay_that_reaches_the_beginning_is_an_erased_memory():
    # Of documents of 5 segments, only the last one counts for a delay of 4, and its memory is the initial one.
    corpus = corpus_from_arrays(documents([5 * SEGMENT_LENGTH, 4 * SEGMENT_LENGTH + 1, 3, 9]), VOCAB_SIZE)
    result = measure_documents(tiny_model(), corpus, delays=[1, 4], num_lanes=2)
    assert result.num_delayed_tokens == SEGMENT_LENGTH + 1
    assert result.delayed_nats[4] == pytest.approx(result.delayed_nats_memory_erased, rel=1e-10)
    assert result.delayed_nats[1] != pytest.approx(result.delayed_nats_memory_erased, rel=1e-6)
    assert result.older_gain(4) == pytest.approx(0, abs=1e-10)
    assert result.recent_gain(0) == 0
    for delay in (0, 1, 4):
        total = result.recent_gain(delay) + result.older_gain(delay)
        assert total == pytest.approx(result.bits_per_byte(None) - result.bits_per_byte(0))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 20 * SEGMENT_LENGTH), min_size=1, max_size=3), num_lanes=st.integers(1, 6))
def test_buckets_are_all_tokens_each_once(lengths, num_lanes):
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
    edges = [0, 1, 2, 4, 8, 16, 32]
    for index, bucket in enumerate(result.buckets):
        first, last = edges[index], edges[index + 1] - 1
        assert (bucket.first_segment, bucket.last_segment) == (first, last)
        assert bucket.label == (f"{first}" if first == last else f"{first}-{last}")
        in_bucket = [
            np.clip(length - first * SEGMENT_LENGTH, 0, (last - first + 1) * SEGMENT_LENGTH) for length in lengths
        ]
        assert bucket.num_tokens == sum(in_bucket) > 0
    assert result.buckets[0].nats == pytest.approx(result.buckets[0].nats_memory_erased, rel=1e-10)
    assert seen[-1] == sum(math.ceil(length / SEGMENT_LENGTH) for length in lengths)


def test_buckets_are_the_documents_one_by_one():
    model = tiny_model()
    arrays = documents([40, 11, 3, 27])
    result = measure_documents(model, corpus_from_arrays(arrays, VOCAB_SIZE), num_lanes=3)
    with torch.no_grad():
        nats = [delayed_nats_by_hand(model, arrays, 0, bucket.first_segment)[0] for bucket in result.buckets]
    for bucket, here, later in zip(result.buckets, nats, [*nats[1:], 0.0], strict=True):
        assert bucket.nats == pytest.approx(here - later, rel=1e-10)


def test_default_delays_reach_as_far_as_documents_do():
    model = tiny_model()
    for num_segments, expected in ((1, [0]), (2, [0, 1]), (5, [0, 1, 2, 4]), (40, [0, 1, 2, 4, 8, 16, 32])):
        corpus = corpus_from_arrays(documents([num_segments * SEGMENT_LENGTH, 3]), VOCAB_SIZE)
        assert list(measure_documents(model, corpus).delayed_nats) == expected


def test_units_of_documents():
    corpus = corpus_from_arrays(documents([12, 24]), VOCAB_SIZE, document_bytes=[24, 48])
    result = measure_documents(tiny_model(), corpus, delays=[2])
    bits_per_token = result.delayed_nats[2] / result.num_delayed_tokens / math.log(2)
    assert result.num_delayed_tokens == 12
    assert result.bits_per_byte(2) == pytest.approx(bits_per_token / 2)


def test_memory_held_does_not_grow_with_the_documents(monkeypatch):
    monkeypatch.setattr("memformer.evaluation.document_retention._TOKENS_AT_ONCE", 80 * SEGMENT_LENGTH)
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
    # Two lanes at each timestep; and then ten timesteps of both, with the initial memory and those of two delays.
    assert sizes == [*[2] * 10, 60] * 7


def test_measuring_documents_leaves_mode_and_randomness_alone():
    model = tiny_model(dropout=0.5).train()
    before = torch.get_rng_state()
    corpus = corpus_from_arrays(documents([40]), VOCAB_SIZE)
    first, second = (measure_documents(model, corpus) for _ in range(2))
    assert first.delayed_nats == second.delayed_nats
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_documents_that_cannot_be_measured_are_refused():
    model = tiny_model()
    corpus = corpus_from_arrays(documents([4 * SEGMENT_LENGTH, 5]), VOCAB_SIZE)
    for delays, message in (
        ([1, -1], r"delays \(1, -1\) must be at least 0"),
        ([4], r"delays go up to 4 segments of 6 tokens, and the longest of the documents has 4"),
    ):
        with pytest.raises(InputError, match=message):
            measure_documents(model, corpus, delays=delays)
    with pytest.raises(InputError, match="vocabulary of 12 tokens, the model one of 11"):
        measure_documents(model, corpus_from_arrays(documents([40]), 12))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        measure_documents(model, corpus)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on documents and a run on a recall task, both tiny; never written to but for retention.json and .png."""
    base = tmp_path_factory.mktemp("retention")
    (base / "texts").mkdir()
    for seed in range(6):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed) * 4)
    config = {
        "threads": 1,
        "device": "cpu",
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "segment_length": 8,
            "num_slots": 3,
        },
        "data": {
            "train": {"kind": "text", "path": str(base / "texts")},
            "validation_fraction": 0.4,
            "cache": str(base / "cache"),
        },
        "training": {"num_updates": 1, "num_lanes": 2, "rollout_length": 2, "sample_tokens": 0},
    }
    recall = {"task": "associative", "num_facts": [1, 3], "num_keys": 5, "max_distance": 2}
    folders = {}
    for name, data in (("documents", config["data"]), ("recall", {"recall": recall})):
        folders[name] = base / name
        (base / f"{name}.yaml").write_text(yaml.safe_dump({**config, "folder": str(base / name), "data": data}))
        call_json("train", base / f"{name}.yaml")
    return folders


def assert_files(folder, printed):
    assert json.loads((folder / "retention.json").read_text()) == printed
    height, width = matplotlib.image.imread(folder / "retention.png").shape[:2]
    assert height > 400
    assert width > 800


def test_retention_of_a_recall_run(runs, tmp_path):
    printed = call_json("retention", runs["recall"])
    assert_files(runs["recall"], printed)
    assert printed["task"] == "associative"
    assert printed["trained_distance"] == 2
    assert printed["num_facts"] == 3
    assert [point["distance"] for point in printed["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert [point["num_tokens"] for point in printed["points"][:2]] == [4 * 8, 5 * 8]
    assert all(point["num_questions"] == 64 * 3 for point in printed["points"])
    peaks = [point["peak_memory_bytes"] for point in printed["points"]]
    assert 0 < peaks[0] <= peaks[-1]
    options = ["--distances", "3", "40", "--num_facts", "1", "--num_episodes", "7", "--questions", "2", "--seed", "5"]
    printed = call_json("retention", runs["recall"], *options, "--output", tmp_path / "new" / "folder")
    assert_files(tmp_path / "new" / "folder", printed)
    assert [(point["distance"], point["num_questions"]) for point in printed["points"]] == [(3, 7), (40, 7)]
    assert printed["max_fact_gap"] == 0
    options = ["--distances", "1", "--max_fact_gap", "1000", "--num_episodes", "2", "--output", tmp_path]
    printed = call_json("retention", runs["recall"], *options)
    assert printed["max_fact_gap"] == 1000
    assert 100 * 8 < printed["points"][0]["num_tokens"] <= (2 * 1001 + 2) * 8
    options = ["--distances", "1", "--facts_per_segment", "2", "--output", tmp_path]
    printed = call_json("retention", runs["recall"], *options)
    assert printed["facts_per_segment"] == 2
    assert printed["points"][0]["num_tokens"] == 4 * 8 - 8  # three facts in two segments
    status, out, _ = call("retention", runs["recall"], "--distances", "3", "--output", tmp_path / "table")
    assert status == 0
    assert "associative, 3 facts; longest distance of training: 2" in out
    assert re.search(r"^ +3 +48 +[01]\.\d{3} +[01]\.\d{3} +192 +[\d,]+ MiB$", out, re.MULTILINE), out
    assert f"{tmp_path / 'table' / 'retention.png'}" in out


def test_retention_of_a_run_on_documents(runs, tmp_path):
    printed = call_json("retention", runs["documents"])
    assert_files(runs["documents"], printed)
    evaluated = call_json("evaluate", runs["documents"])
    assert printed["num_tokens"] == evaluated["num_tokens"] == sum(p["num_tokens"] for p in printed["positions"])
    mean = sum(p["bits_per_token"] * p["num_tokens"] for p in printed["positions"]) / printed["num_tokens"]
    assert mean == pytest.approx(evaluated["with_memory"]["bits_per_token"], rel=1e-5)
    assert [point["delay"] for point in printed["delays"]["points"]] == [0, 1, 2, 4, 8, 16, 32]
    assert 0 < printed["delays"]["num_tokens"] < printed["num_tokens"]
    options = ["--delays", "5", "3", "--max_tokens", "10", "--num_lanes", "1", "--output", tmp_path]
    printed = call_json("retention", runs["documents"], *options)
    assert_files(tmp_path, printed)
    assert printed["num_documents"] == 1
    assert [point["delay"] for point in printed["delays"]["points"]] == [0, 3, 5]
    assert printed["delays"]["first_segment"] == 5
    status, out, _ = call("retention", runs["documents"], *options)
    assert status == 0
    assert "bits per token by position in the document" in out
    assert "at least 5 segments of 8 tokens before them" in out
    assert f"{tmp_path / 'retention.png'}" in out


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("recall", ["--delays", "1"], "--delays has no meaning for a run on a recall task"),
        ("recall", ["--max_tokens", "1"], "--max_tokens has no meaning for a run on a recall task"),
        ("recall", ["--num_lanes", "1"], "--num_lanes has no meaning for a run on a recall task"),
        ("recall", ["--distances", "0", "3"], "distances (0, 3) must be at least 1 segment each"),
        ("recall", ["--distances", "-2"], "distances (-2) must be at least 1 segment each"),
        ("recall", ["--num_facts", "6"], "num_facts (6) does not fit the task"),
        ("recall", ["--facts_per_segment", "0"], "facts_per_segment (0, 0) must be fewest and most, at least 1"),
        ("recall", ["--num_slots", "9"], "only slots that share one vector"),
        ("recall", ["--max_fact_gap", "-1"], "max_fact_gap (-1) must be at least 0"),
        ("recall", ["--num_episodes", "0"], "num_episodes (0) must be at least 1"),
        ("recall", ["--questions", "0"], "questions (0) must be at least 1"),
        ("recall", ["--seed", "-1"], "seed (-1) must be from 0"),
        ("recall", ["--distances", "far"], "distances"),
        ("recall", ["--distances"], "expected at least one argument"),
        ("recall", ["--distance", "3"], "unknown option --distance; did you mean --distances?"),
        ("recall", ["--distances", "1", "--output", "/proc/none"], "/proc/none/retention.json could not be written"),
        ("documents", ["--distances", "1"], "--distances has no meaning for a run on documents"),
        ("documents", ["--max_fact_gap", "1"], "--max_fact_gap has no meaning for a run on documents"),
        ("documents", ["--facts_per_segment", "1"], "--facts_per_segment has no meaning for a run on documents"),
        ("documents", ["--num_facts", "1"], "--num_facts has no meaning for a run on documents"),
        ("documents", ["--num_episodes", "1"], "--num_episodes has no meaning for a run on documents"),
        ("documents", ["--questions", "1"], "--questions has no meaning for a run on documents"),
        ("documents", ["--seed", "1"], "--seed has no meaning for a run on documents"),
        ("documents", ["--delays", "-1"], "delays (-1) must be at least 0"),
        ("documents", ["--delays", "1000"], "delays go up to 1000 segments of 8 tokens"),
        ("documents", ["--max_tokens", "0"], "max_tokens (0) must be at least 1"),
        ("documents", ["--num_lanes", "0"], "num_lanes (0) must be at least 1"),
    ],
)
def test_refused_retention(runs, kind, options, message):
    assert message in refused("retention", runs[kind], *options)


def test_an_evaluation_on_a_recall_task_has_no_lanes(runs):
    assert "--num_lanes has no meaning for a run on a recall task" in refused(
        "evaluate", runs["recall"], "--num_lanes", "3"
    )


def test_retention_without_a_run(runs, tmp_path):
    assert "required: run" in refused("retention")
    assert str(tmp_path) in refused("retention", tmp_path)
    model = Memformer.from_pretrained(runs["recall"] / "best")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(load_tokenizer(runs["recall"]), tmp_path / "model")
    assert "has no config.yaml, which tells what to measure on" in refused("retention", tmp_path / "model")


def test_help_of_retention():
    status, out, err = call("retention", "--help")
    assert (status, err) == (0, "")
    for option in ("--distances", "--num_facts", "--delays", "--max_tokens", "memformer retention runs/demo"):
        assert option in out
    assert "memformer retention RUN" in call("--help")[1]
