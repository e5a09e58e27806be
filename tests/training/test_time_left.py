"""The remaining time of a run: updates, periodic evaluations and the final evaluation."""

import itertools
import json
from types import SimpleNamespace

import pytest

from memformer.cli.main import main
from memformer.training.config import TrainingConfig
from memformer.training.logs import RunLog
from memformer.training.time_left import TimeLeft
from tests.training.runs import config_file, run_config


def test_the_time_left_counts_the_evaluations():
    """At the last update the final evaluation is still left, in proportion to its tokens."""
    left = TimeLeft(TrainingConfig(num_updates=10, evaluate_every=4), periodic_tokens=100, final_tokens=1000)
    assert left.seconds(0) == 0
    left.add_update(2.0, num_tokens=50)
    # No evaluation is timed yet: 100 tokens take as long as in training, 4 s. There are 3 (after 4, 8 and 10 updates).
    assert left.seconds(1) == pytest.approx(9 * 2 + 3 * 4 + 40)
    assert left.seconds(4) == pytest.approx(6 * 2 + 3 * 4 + 40)  # the one that is due is still left
    left.add_update(2.0, num_tokens=50)
    # The sample takes 3 of 4 seconds, and the final evaluation has none.
    left.add_evaluation(4.0, reading_seconds=1.0)
    assert left.seconds(5) == pytest.approx(5 * 2 + 2 * 4 + 10)
    assert left.seconds(9) == pytest.approx(1 * 2 + 4 + 10)
    assert left.seconds(10) == pytest.approx(4 + 10)


@pytest.mark.parametrize(("num_updates", "every", "updates"), [(10, 4, (4, 8, 10)), (8, 4, (4, 8)), (3, 5, (3,))])
def test_each_evaluation_counts_until_it_has_been_made(num_updates, every, updates):
    left = TimeLeft(TrainingConfig(num_updates=num_updates, evaluate_every=every), periodic_tokens=1, final_tokens=0)
    left.add_update(0.0, num_tokens=1)
    left.add_evaluation(1.0, reading_seconds=1.0)
    for update in range(1, num_updates + 1):
        assert left.seconds(update) == sum(update <= evaluated for evaluated in updates)


def test_the_first_update_counts_only_until_there_is_a_second():
    """It also compiles the model: minutes, which were taken for the time of every update."""
    left = TimeLeft(TrainingConfig(num_updates=100, evaluate_every=100), periodic_tokens=100, final_tokens=0)
    left.add_update(300.0, num_tokens=100)
    left.add_update(2.0, num_tokens=100)
    assert left.seconds(2) == pytest.approx(98 * 2 + 2)


def test_a_run_shows_the_time_of_the_final_evaluation(base, tmp_path, monkeypatch):
    shown, num_tokens, add_update = {}, [], TimeLeft.add_update

    def add_and_record(left, seconds, **tokens):
        add_update(left, seconds, **tokens)
        num_tokens.append(tokens["num_tokens"])

    monkeypatch.setattr(TimeLeft, "add_update", add_and_record)
    monkeypatch.setattr(RunLog, "advance", lambda log, update, *, seconds_left: shown.update({update: seconds_left}))
    monkeypatch.setattr(TimeLeft, "add_evaluation", lambda left, seconds, **_: None)
    seconds = itertools.count()  # an update takes one
    monkeypatch.setattr("memformer.training.loop.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0)
    assert main(["train", config_file(config), "--folder", str(tmp_path / "run")]) == 0
    # The periodic evaluation is still left too; both are on the same 61 tokens.
    assert shown == pytest.approx({1: 1 + 2 * 61 / num_tokens[0], 2: 2 * 61 / num_tokens[1]})


def test_a_recall_task_counts_the_tokens_that_it_reads(base, tmp_path, monkeypatch):
    """It predicts few of them: by these, its first evaluation seemed many times as long as it is."""
    reads = []
    monkeypatch.setattr(TimeLeft, "add_update", lambda left, seconds, *, num_tokens: reads.append(num_tokens))
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0)
    task = ["--data.recall.task", "fact", "--data.recall.max_distance", "6"]
    assert main(["train", config_file(config), "--folder", str(tmp_path / "run"), *task]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    predicted = [line["num_tokens"] for line in lines if line["kind"] == "training"][-1]
    assert len(reads) == 2
    assert sum(reads) > 5 * predicted > 0


def test_the_time_left_follows_the_load_of_the_machine():
    """An update in which the computer was asleep, or a busy hour, does not count for the rest of the run."""
    left = TimeLeft(TrainingConfig(num_updates=1_000, evaluate_every=1_000), periodic_tokens=100, final_tokens=100)
    for seconds in (1.0, 7_200.0, *[2.0] * 300):
        left.add_update(seconds, num_tokens=100)
    assert left.seconds(302) == pytest.approx(698 * 2 + 2 + 2, rel=1e-3)
