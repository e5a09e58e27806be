"""Recall is measured exactly: oracles are right up to their limit, and sessions give the same answers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError, Session
from memformer.data import RecallConfig, RecallStream, make_task
from memformer.evaluation.recall import measure_recall
from memformer.models import RecurrentModel
from memformer.training.run_data import RecallData
from tests.helpers import assert_close, tiny_model


class Oracle(RecurrentModel):
    """A model that remembers the last value of each key until the fact is `limit` segments old, and answers with it.

    Its memory has one row per key: the value's id, 0 for none, and the number of segments since the fact.
    """

    segment_length = 16

    def __init__(self, task, limit, *, refreshed_by_questions=False):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))  # gives the model a device
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


def test_no_episode_of_an_evaluation_is_one_of_training(monkeypatch):
    """Whatever the seed of both: episodes that were seen are no evidence."""
    drawn, generator = [], np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seed: drawn.append(str(generator(seed).state)) or generator(seed))
    config = RecallConfig(task="associative", num_facts=(1, 6), max_distance=4)
    task = make_task(config)
    model = tiny_model(vocab_size=task.tokenizer.vocab_size, segment_length=16)
    options = {"num_lanes": 1, "segment_length": 16, "rollout_length": 64, "bos_token_id": model.bos_token_id}
    for seed in range(3):
        for _ in zip(range(20), RecallStream(task, config, seed=seed, **options), strict=False):
            pass
    training = set(drawn)
    assert len(training) >= 60
    drawn.clear()
    for seed in range(3):
        RecallData(config, task, task).held_out_episode(model, seed=seed)
        for num_facts in (1, 2, 6):
            measure_recall(model, task, config, distances=[1, 2, 4], num_facts=num_facts, num_episodes=2, seed=seed)
    assert len(set(drawn)) >= 3 * (1 + 3 * 4)
    # The episode of generator 0 is asked nothing: it tells how many questions an episode has.
    assert not training & set(drawn) - {str(generator(0).state)}


def random_model(config, seed=0):
    """Return an untrained Memformer with the vocabulary of a task."""
    # From the last token, an untrained decoder would always answer with that token.
    return tiny_model(seed, vocab_size=make_task(config).tokenizer.vocab_size, decoder_start_tokens=0)


class Recorded(RecurrentModel):
    """A model that records every encoded segment, with its targets and logits if it was decoded, otherwise None."""

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
def test_an_oracle_is_right_exactly_up_to_its_limit(task, limit):
    num_facts = 1 if task == "fact" else 4
    config = RecallConfig(task=task, num_facts=(num_facts, num_facts), facts_per_segment=(num_facts, num_facts))
    measured = accuracies(Oracle(make_task(config), limit), config, range(1, 12))
    assert measured == {distance: float(distance <= limit) for distance in range(1, 12)}


@settings(max_examples=20)
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
    # The first segment is [BOS] alone.
    assert point.num_tokens == (len(model.segments) - 2) * model.segment_length


@pytest.mark.parametrize("distances", [[6], [1, 6], [*range(1, 7)], [6, 3, 3, 1, 4]])
def test_questions_leave_no_trace(distances):
    config = RecallConfig(task="associative", num_facts=(2, 2), facts_per_segment=(2, 2))
    model = Oracle(make_task(config), 5, refreshed_by_questions=True)
    measured = accuracies(model, config, distances)
    assert measured == {distance: float(distance <= 5) for distance in sorted(set(distances))}


def test_the_accuracy_at_a_distance_does_not_depend_on_the_other_distances():
    config = RecallConfig(task="rewrite", num_facts=(5, 5), num_keys=3)

    def read(**options):
        recorded = Recorded(random_model(config))
        points = measure_recall(recorded, make_task(config), config, num_facts=5, num_episodes=3, **options).points
        filler = [segment for segment, decoded in recorded.segments if decoded is None]
        questions_read = [(segment, *decoded) for segment, decoded in recorded.segments if decoded is not None]
        return points, torch.stack(filler[1:]), [torch.stack(tensors) for tensors in zip(*questions_read, strict=True)]

    points, filler, questions_read = read(distances=range(1, 9))
    few_points, few_filler, few_questions_read = read(distances=[5, 8])
    assert few_points == [points[4], points[7]]
    assert torch.equal(few_filler, filler)
    # There are up to three keys, so up to three turns of questions at each distance.
    turns = len(questions_read[0]) // 8
    for few_tensors, tensors in zip(few_questions_read, questions_read, strict=True):
        assert torch.equal(few_tensors, torch.cat([tensors[4 * turns : 5 * turns], tensors[7 * turns :]]))
    _, other_filler, _ = read(distances=range(1, 9), seed=1)
    assert not torch.equal(other_filler, filler)


def test_a_question_counts_once():
    config = RecallConfig(task="rewrite", num_facts=(6, 6), facts_per_segment=(6, 6), num_keys=3)
    model = Oracle(make_task(config), 100)
    for questions in (1, 2, 3, 9):
        recall = measure_recall(
            model, model.task, config, distances=[1, 2], num_facts=6, num_episodes=7, questions_per_episode=questions
        )
        keys_of_rows = [{token for token in row if token in model.task._keys} for row in model.segments[1].tolist()]
        assert len(keys_of_rows) == 7
        for point in recall.points:
            assert point.num_questions == point.num_right == sum(min(questions, len(keys)) for keys in keys_of_rows)
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
def test_an_answer_is_right_if_a_session_generates_it(task, num_facts, options):
    config = RecallConfig(task=task, num_facts=(num_facts, num_facts), **options)
    # An untrained model that gives some right answers.
    model = random_model(config, seed=7)
    recorded = Recorded(model)
    measured = measure_recall(
        recorded, make_task(config), config, distances=[1, 2, 5], num_facts=num_facts, num_episodes=12
    )
    filler, num_right, num_right_erased, is_erased = [], {}, 0, True
    for segment, decoded in recorded.segments:
        if decoded is None:
            filler.append(segment)
            continue
        targets, logits = decoded
        is_erased = not is_erased
        if is_erased:  # the previous question again
            hidden, _ = model.encode(segment)
            answers = model.decode(targets, hidden=hidden).argmax(dim=-1)
            num_right_erased += int((answers == targets).all(dim=-1).sum())
            continue
        session = Session(model, batch_size=12)
        # The first segment is [BOS], which a session reads by itself.
        session.feed(torch.cat([*filler[1:], segment], dim=1))
        num_tokens = session.num_tokens[0]
        assert_close(session.next_token_logits(), logits[:, 0])
        answers = torch.tensor(session.generate(targets.shape[1], temperature=0))
        num_right[num_tokens] = num_right.get(num_tokens, 0) + int((answers == targets).all(dim=-1).sum())
    # [BOS] and padding, as in training.
    assert filler[0].tolist() == [[model.bos_token_id] + [0] * (model.segment_length - 1)] * 12
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
        ("fact", {"distances": [0, 4]}, r"distances \(0\) must be at least 1"),
        ("fact", {"distances": []}, r"distances are empty"),
        ("fact", {"num_episodes": 0}, r"num_episodes \(0\) must be at least 1"),
        ("fact", {"questions_per_episode": 0}, r"questions \(0\) must be at least 1"),
        ("fact", {"num_facts": 0}, r"num_facts \(0\) must be at least 1"),
        ("fact", {"num_facts": 2}, r"num_facts \(2\) does not fit the task: "),
        (
            "associative",
            {"num_facts": 5},
            r"num_facts \(5\) does not fit the task: .* must not exceed data.recall.num_keys \(4\)",
        ),
        ("associative", {"num_facts": 4}, r"num_facts \(4\) does not fit the task: model.segment_length \(6\)"),
        (
            "copy",
            {"num_facts": 2},
            r"num_facts \(2\) does not fit the task: an answer would have 2 tokens, but the task's answers have at "
            "most 1",
        ),
    ],
)
def test_impossible_measurements_are_refused(task, options, message):
    config = RecallConfig(task=task, num_keys=4 if task == "associative" else 32, facts_per_segment=(4, 4))
    with pytest.raises(InputError, match=message):
        measure_recall(random_model(config), make_task(config), config, **{"distances": [1], "num_facts": 1, **options})
