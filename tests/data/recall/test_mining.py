"""Mined decoys: text that the model writes is shown again, half of the decoys, and resuming changes nothing."""

import dataclasses
import json
import re

import pytest
import torch

from memformer import InputError
from memformer.data import CurriculumConfig, RecallStream
from memformer.data.recall import stream as stream_module
from memformer.errors import CheckpointError
from tests.data.recall.texts import babi, text_of, text_task, write_stories

LENGTH = 12
STORIES = "1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\t1\n"
# Only the last text has dots, and only the first one a place of the stories.
TEXTS = ["a bathroom not on the mat", "the cat sat on a mat and the dog did not " * 20, "the dog . . . did " * 2]


@pytest.fixture
def task_and_config(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "_EPISODES_UNTIL_FILLER_IS_KNOWN", 3)
    path = write_stories(tmp_path, STORIES)
    config = babi(path, num_facts=(1, 1), max_distance=3, decoy_probability=1.0, mine_decoys=True)
    return text_task(config, texts=TEXTS), config


def make_stream(task, config, **changes):
    size = {"num_lanes": 8, "segment_length": LENGTH, "rollout_length": 99, "bos_token_id": 999, "seed": 0}
    return RecallStream(task, config, **{**size, **changes})


def dots_of(task):
    """Return a writer of segments with dots, and the segments that it was asked about."""
    asked = []
    (dot,) = set(task.tokenizer.encode(b" . . .", "dots").tolist())

    def is_written(segments):
        asked.append(segments)
        return (segments == dot).any(dim=1)

    return is_written, asked


def decoys_of(task, rollout):
    """Yield the texts of segments without a fact and without a question."""
    has_question = ~rollout.target_padding.all(dim=-1)
    for timestep in range(2, rollout.num_timesteps):
        for row in range(rollout.batch_size):
            if not has_question[timestep, row]:
                yield text_of(task, rollout.inputs[timestep, row])


def test_half_of_the_decoys_are_text_that_was_written(task_and_config, monkeypatch):
    task, config = task_and_config
    stream, (is_written, asked) = make_stream(task, config), dots_of(task)
    for index in range(60):
        decoys = [*decoys_of(task, next(stream))]
        if index <= 2:
            assert all("bathroom" in decoy for decoy in decoys)
        stream.observe(1.0, is_written=is_written)
        # The model is asked from the third episode on: until then writing filler costs little.
        assert len(asked) == max(0, index - 1)
    assert all(segments.shape == (512, LENGTH) for segments in asked)
    assert not torch.equal(asked[0], asked[1])
    mined = stream.state()["mined_decoys"]
    assert len(mined) == 128
    # The last that were found, and no others.
    starts = torch.cat([segments[is_written(segments)] for segments in list(asked)])[-128:]
    assert [task.read(start, LENGTH).tolist() for start in mined] == starts.tolist()
    monkeypatch.setattr(
        task, "make_decoy", lambda generator, num_tokens: task.tokenizer.encode(b" Mary" * num_tokens, "")
    )
    decoys = [decoy for _ in range(60) for decoy in decoys_of(task, next(stream))]
    found = [decoy for decoy in decoys if "Mary" not in decoy]
    assert len(decoys) > 200
    assert abs(len(found) / len(decoys) - 1 / 2) < 3 * 0.5 / len(decoys) ** 0.5
    # They are shown from other positions, too.
    assert len(set(found)) > LENGTH


def test_without_the_option_the_model_is_asked_nothing(task_and_config):
    task, config = task_and_config
    stream, (is_written, asked) = make_stream(task, dataclasses.replace(config, mine_decoys=False)), dots_of(task)
    for _ in range(9):
        next(stream)
        stream.observe(1.0, is_written=is_written)
    assert not asked
    assert stream.state()["mined_decoys"] == []


def test_before_the_end_of_the_curriculum_the_model_is_asked_nothing(task_and_config):
    task, config = task_and_config
    config = dataclasses.replace(config, curriculum=CurriculumConfig(start_distance=1, window=2, advance_below=0.5))
    stream, (is_written, asked) = make_stream(task, config), dots_of(task)
    for _ in range(9):
        next(stream)
        stream.observe(1.0, is_written=is_written)
    assert not stream.is_hardest
    assert not asked


@pytest.mark.parametrize("rollout_length", [2, 99])
def test_a_stream_with_mined_decoys_resumes_exactly(task_and_config, rollout_length):
    task, config = task_and_config
    stream, (is_written, asked) = make_stream(task, config, rollout_length=rollout_length), dots_of(task)
    for _ in range(40):
        resumed = make_stream(task, config, rollout_length=rollout_length)
        resumed.load_state(json.loads(json.dumps(stream.state())))
        rollouts = [next(each) for each in (stream, resumed)]
        assert torch.equal(rollouts[0].inputs, rollouts[1].inputs)
        for each in (stream, resumed):
            each.observe(1.0, is_written=is_written)
        assert stream.state() == resumed.state()
    assert len(asked) > 20
    assert len(stream.state()["mined_decoys"]) == 128


@pytest.mark.parametrize("mined", [None, [1.5], [-1], [True], "12"])
def test_damaged_positions_are_refused(task_and_config, mined):
    stream = make_stream(*task_and_config)
    with pytest.raises(CheckpointError, match=re.escape(f"the data cursor has mined_decoys {mined!r}")):
        stream.load_state({**stream.state(), "mined_decoys": mined})


def test_a_cursor_without_positions_has_none(task_and_config):
    stream = make_stream(*task_and_config)
    state = stream.state()
    del state["mined_decoys"]
    stream.load_state(state)
    assert stream.state()["mined_decoys"] == []


def test_mining_needs_decoys(tmp_path):
    with pytest.raises(
        InputError, match=r"recall\.mine_decoys \(true\) needs a data\.recall\.decoy_probability above 0"
    ):
        babi(write_stories(tmp_path), mine_decoys=True)
