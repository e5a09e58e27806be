"""Recall episodes: facts determine every answer, no input repeats an answer, and a stream resumes from anywhere."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from memformer import InputError
from memformer.data import CurriculumConfig, RecallConfig, RecallStream, make_task
from memformer.data.recall.stream import _EPISODES_UNTIL_FILLER_IS_KNOWN
from memformer.errors import CheckpointError

SEGMENT_LENGTH = 6

BOS = 1000


def make_stream(config, *, rollout_length=1000, seed=3, num_lanes=5):
    return RecallStream(
        make_task(config),
        config,
        num_lanes=num_lanes,
        segment_length=SEGMENT_LENGTH,
        rollout_length=rollout_length,
        bos_token_id=BOS,
        seed=seed,
    )


CONFIGS = {
    "fact": RecallConfig(task="fact", max_distance=9),
    "associative": RecallConfig(task="associative", num_facts=(2, 5), num_keys=7, max_distance=9),
    "many a segment": RecallConfig(
        task="associative", num_facts=(1, 5), facts_per_segment=(3, 3), num_keys=7, max_distance=9
    ),
    "rewrite": RecallConfig(task="rewrite", num_facts=(4, 8), num_keys=3, max_fact_gap=2, max_distance=9),
    "copy": RecallConfig(task="copy", num_facts=(1, 4), max_fact_gap=1, max_distance=9),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def words_of(config, tokens):
    return make_task(config).tokenizer.decode(list(tokens)).decode().split()


def test_distances_and_facts_of_a_segment_are_log_uniform():
    """A distance of 1 of up to 15 has the share log 2 / log 16, which is a quarter, not a fifteenth."""
    stream = make_stream(RecallConfig(task="fact", max_distance=15), num_lanes=1)
    distances = np.array([len(rollout.inputs) - 2 for rollout, _ in zip(stream, range(800), strict=False)])
    assert (distances.min(), distances.max()) == (1, 15)
    assert np.mean(distances == 1) == pytest.approx(np.log(2) / np.log(16), abs=0.05)
    config = RecallConfig(task="copy", num_facts=(6, 6), facts_per_segment=(1, 6), max_distance=1)
    lengths = np.array([len(rollout.inputs) for rollout, _ in zip(make_stream(config), range(800), strict=False)])
    assert np.mean(lengths == lengths.max()) == pytest.approx(np.log(2) / np.log(7), abs=0.05)  # one fact each


def test_questions_have_their_probability():
    config = RecallConfig(task="fact", max_distance=8, question_probability=0.25)
    stream = make_stream(config, num_lanes=40)
    shares = [
        (~rollout.target_padding[2:-1, :, 0]).float().mean().item()
        for rollout, _ in zip(stream, range(60), strict=False)
        if len(rollout.inputs) > 3
    ]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03)


def test_filler_is_every_segment_without_a_fact(config):
    stream = make_stream(config)
    stream.load_state({**stream.state(), "episode": _EPISODES_UNTIL_FILLER_IS_KNOWN})
    for rollout, _ in zip(stream, range(5), strict=False):
        assert rollout.is_filler[0].all()  # reads no text
        facts = torch.tensor([[has_fact(config, row) for row in segments] for segments in rollout.inputs[1:]])
        # Rows with fewer facts than others may lack one in a segment for facts.
        assert not (rollout.is_filler[1:] & facts).any()
        assert torch.equal(~rollout.is_filler[1:].all(dim=1), facts.any(dim=1))


def test_a_growing_share_of_filler_is_known_once_the_curriculum_has_ended():
    stream = make_stream(CURRICULUM, num_lanes=400)
    for _ in range(7):
        assert next(stream).is_filler is None
    while not stream.is_hardest:
        stream.observe(0.0)
    start = stream.state()["episode"]
    for share in (0, 0.25, 0.6, 1, 2):
        stream.load_state({**stream.state(), "episode": start + round(share * _EPISODES_UNTIL_FILLER_IS_KNOWN)})
        rollout = next(stream)
        facts = torch.tensor([[has_fact(CURRICULUM, row) for row in segments] for segments in rollout.inputs[1:]])
        assert not (rollout.is_filler[1:] & facts).any()
        known = rollout.is_filler[1:][~facts.any(dim=1)].double()
        assert abs(known.mean() - min(share, 1)) <= 4 * (share * max(1 - share, 0) / known.numel()) ** 0.5


def test_with_a_cursor_of_an_earlier_version_filler_becomes_known_from_there_on():
    stream = make_stream(CONFIGS["fact"])
    state = {**stream.state(), "episode": 7 * _EPISODES_UNTIL_FILLER_IS_KNOWN}
    del state["first_episode_of_level"]
    stream.load_state(state)
    assert not next(stream).is_filler.any()


def has_fact(config, tokens):
    return any(word.startswith("value") for word in words_of(config, tokens.tolist()))


def rows_of(config, rollout):
    """Yield each row as (words read, answer words or None) for every timestep after the first."""
    for row in range(rollout.batch_size):
        timesteps = []
        for timestep in range(1, rollout.num_timesteps):
            keep = ~rollout.target_padding[timestep, row]
            answer = words_of(config, rollout.targets[timestep, row][keep].tolist()) if keep.any() else None
            timesteps.append((words_of(config, rollout.inputs[timestep, row].tolist()), answer))
        yield timesteps


def expected_answer(config, words, question):
    if config.task == "copy":
        return words
    key = question[1]
    return [dict(zip(words[::2], words[1::2], strict=True))[key]]


def test_every_answer_follows_from_the_facts_and_is_never_repeated(config):
    num_questions = 0
    stream = make_stream(config)
    for _ in range(25):
        for timesteps in rows_of(config, next(stream)):
            words = []
            for read, answer in timesteps:
                if answer is None:
                    assert "?" not in read
                    words += [word for word in read if not word.startswith("filler")]
                    continue
                question = read[read.index("?") :]
                # Before the question there is filler only: the answer has not been repeated.
                assert all(word.startswith("filler") for word in read[: -len(question)])
                assert answer == expected_answer(config, words, question)
                num_questions += 1
    assert num_questions > 100


def test_facts_are_inserted_into_the_configured_number_of_segments():
    config = RecallConfig(task="associative", num_facts=(5, 5), facts_per_segment=(2, 2), num_keys=9, max_distance=1)
    for timesteps in rows_of(config, next(make_stream(config))):
        num_facts = [sum(word.startswith("key") for word in read) for read, answer in timesteps if answer is None]
        assert num_facts == [2, 2, 1]


def test_each_rollout_draws_its_number_of_facts_per_segment():
    config = RecallConfig(task="associative", num_facts=(6, 6), facts_per_segment=(1, 3), num_keys=9, max_distance=1)
    stream = make_stream(config)
    seen = set()
    for _ in range(40):
        (num_facts,) = {
            tuple(sum(word.startswith("key") for word in read) for read, answer in timesteps if answer is None)
            for timesteps in rows_of(config, next(stream))
        }
        seen.add(num_facts)
    assert seen == {(1,) * 6, (2,) * 3, (3,) * 2}


def test_the_first_timestep_is_that_of_a_document(config):
    rollout = next(make_stream(config))
    assert (rollout.inputs[0, :, 0] == BOS).all()
    assert rollout.input_padding[0, :, 1:].all()
    assert not rollout.input_padding[1:].any()
    assert rollout.reset[0].all()
    assert not rollout.reset[1:].any()
    assert rollout.target_padding[0].all()


def test_every_row_has_a_question_at_the_horizon_and_horizons_reach_the_largest_distance():
    config = RecallConfig(task="fact", max_distance=4, question_probability=0.0)
    stream = make_stream(config)
    distances = set()
    for _ in range(60):
        rollout = next(stream)
        has_question = (~rollout.target_padding).any(dim=-1)
        assert has_question[-1].all()
        assert not has_question[:-1].any()
        distances.add(rollout.num_timesteps - 2)
    assert distances == {1, 2, 3, 4}


def assert_equal(rollout, other):
    for name in ("inputs", "targets", "reset", "input_padding", "target_padding"):
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    assert (rollout.is_filler is None) == (other.is_filler is None)
    assert rollout.is_filler is None or torch.equal(rollout.is_filler, other.is_filler)


def test_a_cut_changes_only_where_rollouts_end(config):
    whole, cut = make_stream(config), make_stream(config, rollout_length=3)
    for _ in range(5):
        episode = next(whole)
        parts = [next(cut) for _ in range(-(-episode.num_timesteps // 3))]
        assert {part.num_timesteps for part in parts[:-1]} <= {3}
        for name in ("inputs", "targets", "reset", "input_padding", "target_padding"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(episode, name)), name


def test_the_cursor_resumes_exactly_from_anywhere(config):
    stream = make_stream(config, rollout_length=3)
    for _ in range(12):
        state = json.loads(json.dumps(stream.state()))
        following = next(stream)
        resumed = make_stream(config, rollout_length=3)
        resumed.load_state(state)
        assert_equal(next(resumed), following)
        assert resumed.state() == stream.state()


CURRICULUM = RecallConfig(
    task="associative",
    num_facts=(1, 4),
    num_keys=8,
    max_distance=12,
    curriculum=CurriculumConfig(start_distance=1, start_facts=1, advance_below=0.5, window=3),
)


def test_the_curriculum_advances_when_the_loss_stays_small_and_ends_at_the_full_task():
    stream = make_stream(CURRICULUM)
    sizes = [(stream.most_facts, stream.max_distance)]
    while not stream.is_hardest:
        for loss in (0.4, 0.9, 0.4, 0.1):  # the mean of three is above 0.5 until the last
            assert (stream.most_facts, stream.max_distance) == sizes[-1]
            stream.observe(loss)
        sizes.append((stream.most_facts, stream.max_distance))
    assert sizes == [(1, 1), (2, 2), (3, 4), (4, 8), (4, 12)]
    before = stream.state()
    for _ in range(9):
        stream.observe(0.0)
    assert stream.state() == before


def test_until_the_curriculum_ends_half_of_the_rollouts_have_the_most_facts():
    easy_start = dataclasses.replace(CURRICULUM, curriculum=CurriculumConfig(start_facts=4, start_distance=1))
    for config, share in ((easy_start, 1 / 2 + 1 / 8), (dataclasses.replace(easy_start, curriculum=None), 1 / 4)):
        stream = make_stream(config, num_lanes=1)
        counts = []
        for _ in range(160):
            (count,) = {
                sum(word.startswith("key") for read, answer in timesteps if answer is None for word in read)
                for timesteps in rows_of(config, next(stream))
            }
            counts.append(count)
        assert set(counts) == {1, 2, 3, 4}
        assert abs(counts.count(4) / len(counts) - share) < 0.12


def test_the_curriculum_resumes_exactly():
    losses = np.random.default_rng(0).uniform(0.2, 0.7, size=40).tolist()
    stream = make_stream(CURRICULUM, rollout_length=4)
    for loss in losses:
        resumed = make_stream(CURRICULUM, rollout_length=4)
        resumed.load_state(json.loads(json.dumps(stream.state())))
        for each in (stream, resumed):
            each.observe(loss)
        assert_equal(next(resumed), next(stream))
    assert stream.level > 1


def test_seeds_differ_and_repeat():
    config = CONFIGS["rewrite"]
    assert_equal(next(make_stream(config)), next(make_stream(config)))
    first, other = next(make_stream(config)), next(make_stream(config, seed=4))
    assert first.inputs.shape != other.inputs.shape or not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "seed 9; this stream has 3"),
        ({"task_fingerprint": "0"}, "task_fingerprint '0'; this stream has"),
        ({"segment_length": 7}, "segment_length 7; this stream has 6"),
        ({"episode": -1}, "must be non-negative integers"),
        ({"level": True}, "must be non-negative integers"),
        ({"first_episode_of_level": None}, "must be non-negative integers"),
        ({"recent_losses": None}, "must be a list of numbers"),
        ({"timestep": 500}, "timestep 500"),
    ],
)
def test_a_cursor_of_another_stream_is_refused_and_changes_nothing(change, message):
    stream = make_stream(CURRICULUM)
    next(stream)
    before = stream.state()
    with pytest.raises(CheckpointError, match=message):
        stream.load_state({**before, **change})
    assert stream.state() == before
    assert_equal(next(stream), next(resumed_from(before)))


def resumed_from(state):
    stream = make_stream(CURRICULUM)
    stream.load_state(state)
    return stream


def test_a_segment_too_short_for_its_facts_is_refused():
    config = RecallConfig(task="associative", num_facts=(4, 4), facts_per_segment=(4, 4))
    with pytest.raises(InputError, match="segment_length \\(6\\) must be at least 8"):
        make_stream(config)
