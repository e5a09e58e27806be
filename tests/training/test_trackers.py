"""Trackers get every number of a run's log once, also if it is interrupted, killed or goes back to a checkpoint."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer import CheckpointError, InputError, SaveError
from memformer.models import build_model
from memformer.training import loop
from memformer.training.config import LoggingConfig
from memformer.training.logs import open_log, read_log
from memformer.training.optimizer import learning_rate_at
from memformer.training.processes import Processes
from memformer.training.run_data import prepare_data
from tests.cli.calls import call, call_json, refused
from tests.training.fake_trackers import FakeTrackio, FakeWandb
from tests.training.runs import NUM_UPDATES, config_file, run_config

pytestmark = pytest.mark.usefixtures("without_report")
ALL = ["tensorboard", "wandb", "trackio"]


@pytest.fixture
def packages(monkeypatch):
    """The stand-ins of wandb and trackio."""
    fakes = FakeWandb(), FakeTrackio()
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fakes


def tracked(base, name, trackers=ALL, **training):
    config = dataclasses.replace(run_config(base, name, **training), logging=LoggingConfig(trackers=trackers))
    shutil.rmtree(config.folder, ignore_errors=True)
    return config


def train(config, *options):
    status, _, error = call("train", config_file(config), *options)
    return status, [line for line in error.splitlines() if "warning" in line]


def logged(folder):
    """Every number of the log, as trackers get them."""
    numbers = []
    for line in read_log(Path(folder)):
        update, kind = line.pop("update"), line.pop("kind")
        for name, value in line.items():
            values = (
                {f"/{timestep}": each for timestep, each in enumerate(value)} if type(value) is list else {"": value}
            )
            numbers += [(update, f"{kind}/{name}{end}", each) for end, each in values.items() if type(each) is not str]
    assert numbers
    return sorted(numbers)


def only_run(package):
    (run,) = package.runs.values()
    assert not run.is_open
    return run


def test_every_number_of_the_log_reaches_every_tracker_once(base, packages, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tracked(base, "every", evaluate_every=4, log_every=3)
    assert train(config) == (0, [])
    for package in packages:
        assert only_run(package).numbers() == logged(config.folder)
    kinds = {name.partition("/")[0] for _, name, _ in logged(config.folder)}
    assert kinds == {"training", "evaluation"}
    assert scalars_of(config) == logged_once(config)
    samples = [(update, "sample", sample_of(config, update)) for update in (4, 8, 10)]
    for package in packages:
        run = only_run(package)
        (start,) = run.starts
        assert run.texts() == samples
        assert json.loads(json.dumps(start["config"])) == config.to_dict()
        assert start["project"] == "memformer"
        assert start["name"].startswith("every")
        assert run.modes == ["offline"]  # the packages read the environment; we pass no mode
    assert only_run(packages[0]).starts[0]["dir"] == config.folder
    assert [event.step for event in events_of(config).Tensors("sample/text_summary")] == [4, 8, 10]


def events_of(config):
    events = EventAccumulator(str(Path(config.folder) / "tensorboard"))
    return events.Reload()


def scalars_of(config):
    """The numbers that TensorBoard shows."""
    events = events_of(config)
    shown = [((event.step, tag), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert len(dict(shown)) == len(shown)
    return dict(shown)


def logged_once(config):
    numbers = logged(config.folder)
    found = {(update, name): pytest.approx(value, rel=1e-6) for update, name, value in numbers}
    assert len(found) == len(numbers)
    return found


def sample_of(config, update):
    return (Path(config.folder) / "samples" / f"update-{update:09d}.txt").read_text(encoding="utf-8")


def interrupted_after(update):
    """A learning rate that sends a signal in the update after `update`, which is still finished and logged."""

    def rate(num_updates, training):
        if num_updates == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate_at(num_updates, training)

    return rate


def test_an_interrupted_run_goes_on_in_the_same_runs_of_the_trackers(base, packages, monkeypatch):
    config = tracked(base, "interrupted")
    for update in (2, 6):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "learning_rate_at", interrupted_after(update))
            assert train(config, *(["--resume"] if update == 6 else [])) == (143, [])
        assert not any(only_run(package).is_open for package in packages)
    assert train(config, "--resume") == (0, [])
    for package in packages:
        assert only_run(package).numbers() == logged(config.folder)
    for package in packages:
        assert len(only_run(package).starts) == 3
        assert [text[0] for text in only_run(package).texts()] == [5, 10]


def follow(config, first, last, *, is_killed=False):
    """Log the updates of a run from `first` to `last`, with an evaluation and a sample after every third."""
    folder = Path(config.folder)
    folder.mkdir(exist_ok=True, parents=True)
    log = open_log(folder, total_updates=99, num_updates=first - 1, config=config)
    for update in range(first, last + 1):
        speed = {"tokens_per_second": 9.0, "peak_memory_bytes": 2**20}
        log.update(update, {"bits_per_token": 8 / update, "memory_gradient_norms": [0.5, 1 / update], **speed})
        if update % 3 == 0:
            log.evaluation(update, Measured(update))
            log.sample(update, f"text {update}")
        if update % 7 == 0:
            log.skipped(update, "the loss is nan", num_skipped=update // 7)
    log.flush()
    if is_killed:
        log._sinks[0].close()
    else:
        log.__exit__(None, None, None)


def test_trackers_are_finished_if_the_log_cannot_be_closed(base, packages, monkeypatch):
    config = tracked(base, "unclosed")
    Path(config.folder).mkdir()
    log = open_log(Path(config.folder), total_updates=9, num_updates=0, config=config)

    close = log._sinks[0].close

    def fail():
        close()
        raise SaveError("the disk is full")

    monkeypatch.setattr(log._sinks[0], "close", fail)
    with pytest.raises(SaveError, match="the disk is full"):
        log.__exit__(None, None, None)
    assert not any(only_run(package).is_open for package in packages)


class Measured(SimpleNamespace):
    def __init__(self, update):
        super().__init__(to_log=lambda: {"bits_per_byte": 7 / update}, to_line=lambda: "measured")


def end_of_process(packages):
    for package in packages:
        for run in package.runs.values():
            run.killed()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sessions=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 8), st.booleans()), min_size=1, max_size=5))
def test_no_number_is_sent_twice_or_not_at_all_whatever_ends_the_sessions(tmp_path_factory, sessions):
    """Each session goes on from any update that the run has reached, and ends or is killed after some updates."""
    packages = FakeWandb(), FakeTrackio()
    config = run_config(tmp_path_factory.mktemp("sessions"), "run")
    config = dataclasses.replace(config, logging=LoggingConfig(trackers=["wandb", "trackio"]))
    reached = farthest = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        for package in packages:
            patch.setitem(sys.modules, package.__name__, package)
        for back, number, is_killed in sessions:
            first = 1 + round(reached * back)
            follow(config, first, first - 1 + number, is_killed=is_killed)
            end_of_process(packages)
            reached = first - 1 + number
            farthest = max(farthest, reached)
        follow(config, reached + 1, farthest + 4)
    for package in packages:
        run = only_run(package)
        assert run.numbers() == logged(config.folder)
        assert run.texts() == [(update, "sample", f"text {update}") for update in range(3, farthest + 5, 3)]


def test_a_run_that_goes_back_says_what_is_not_sent_again(base, packages, capsys):
    config = tracked(base, "back")
    follow(config, 1, 10)
    assert capsys.readouterr().err.count("warning") == 0
    follow(config, 6, 12)
    end = "has the numbers up to update 10 from before; those of the updates repeated now are not sent again"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [f"memformer: warning: {name} {end}" for name in ("wandb", "trackio")]
    assert scalars_of(config) == logged_once(config)


def test_a_tracker_added_later_gets_the_rest_in_a_run_of_its_own(base, packages):
    follow(tracked(base, "added", trackers=["trackio"]), 1, 5)
    config = dataclasses.replace(run_config(base, "added"), logging=LoggingConfig(trackers=["trackio", "wandb"]))
    follow(config, 6, 10)
    expected = logged(config.folder)
    assert only_run(packages[1]).numbers() == expected
    assert only_run(packages[0]).numbers() == [number for number in expected if number[0] > 5]
    assert not (Path(config.folder) / "tensorboard").exists()


def test_two_runs_whose_folders_have_one_name_are_two_runs(base, packages):
    for parent in ("a", "b"):
        follow(tracked(base, f"{parent}/same", trackers=["wandb", "trackio"]), 1, 3)
    for package in packages:
        first, second = package.runs.values()
        assert first.numbers() == second.numbers()


FAILED = (
    "memformer: warning: the tracker 'trackio' failed and gets nothing more of this run, which goes on: "
    "ConnectionError: no route to host"
)


def test_a_tracker_that_fails_costs_one_warning_and_nothing_else(base, unbroken, packages, monkeypatch):
    config = tracked(base, "failing")
    calls = 0

    def fail(*_, **__):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(packages[1], "log", fail)
    assert train(config) == (0, [FAILED])
    assert calls == 4
    assert only_run(packages[0]).numbers() == logged(config.folder)
    results = [json.loads((Path(folder) / "evaluation.json").read_text()) for folder in (config.folder, unbroken)]
    assert results[0] == results[1]


def test_a_tracker_that_cannot_finish_costs_one_warning(base, packages, monkeypatch, capsys):
    def fail():
        raise ConnectionError("no route to host")

    monkeypatch.setattr(packages[1], "finish", fail)
    config = tracked(base, "endless", trackers=["trackio", "wandb"])
    follow(config, 1, 3)
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [FAILED]
    assert only_run(packages[0]).numbers() == logged(config.folder)


def test_what_a_tracker_missed_after_a_failure_is_sent_when_updates_are_repeated(base, packages, monkeypatch):
    """It has nothing after its failure, whatever the log has; the numbers before it are not sent again."""
    config = tracked(base, "missed", trackers=["trackio"])
    log = packages[1].log

    def fail(metrics, *, step):
        if step > 7:
            raise ConnectionError("no route to host")
        log(metrics, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(packages[1], "log", fail)
        follow(config, 1, 10, is_killed=True)
    end_of_process(packages)
    assert {step for step, *_ in packages[1].current.numbers()} == {*range(1, 8)}
    follow(config, 5, 12)
    assert only_run(packages[1]).numbers() == logged(config.folder)


def test_a_tracker_that_cannot_start_refuses_a_new_run_but_not_a_resumed_one(base, packages, monkeypatch, capsys):
    config = tracked(base, "offline", trackers=["tensorboard", "trackio", "wandb"])

    def fail(**_):
        raise RuntimeError("not logged in")

    with monkeypatch.context() as patch:
        patch.setattr(packages[0], "init", fail)
        message = refused("train", config_file(config))
        assert message == "the tracker 'wandb' of logging.trackers cannot start: not logged in"
        assert not only_run(packages[1]).entries
    follow(config, 1, 5)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(packages[0], "init", fail)
        follow(config, 6, 10)
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "memformer: warning: the tracker 'wandb' failed and gets nothing more of this run, which goes on: "
        "RuntimeError: not logged in"
    ]
    assert only_run(packages[1]).numbers() == logged(config.folder)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_named_before_anything_is_done(base, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = tracked(base, "missing", trackers=[name])
    message = refused("train", config_file(config))
    assert message.startswith(
        f"the tracker '{name}' of logging.trackers needs the package {name}: pip install {name} ("
    )
    assert not (Path(config.folder) / "config.yaml").exists()
    with (
        pytest.raises(InputError, match=f"needs the package {name}"),
        open_log(base, total_updates=1, num_updates=0, config=config),
    ):
        pass


def test_only_the_first_process_logs(base, packages):
    config = tracked(base, "second process")
    trainer = loop._Trainer(
        config, prepare_data(config.data), build_model(config.model), resume=False, processes=Processes()
    )
    trainer.processes.rank = 1
    with trainer._open_log() as log:
        assert not log._sinks
    assert not packages[0].runs
    assert not packages[1].runs
    assert not Path(config.folder).exists()


def test_the_result_stays_alone_on_stdout(base, packages):
    """trackio prints to stdout."""
    config = tracked(base, "stdout", trackers=["trackio"], num_updates=1, warmup_updates=0)
    assert call_json("train", config_file(config))["run"] == config.folder


def test_without_trackers_there_are_no_files_of_them(base):
    config = tracked(base, "none", trackers=[])
    follow(config, 1, 3)
    assert [file.name for file in Path(config.folder).iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trackers": ["mlflow"]}, r"logging\.trackers \('mlflow'\) must be one of tensorboard, wandb, trackio"),
        ({"trackers": ["wandb", "wandb"]}, r"logging\.trackers \(\['wandb', 'wandb'\]\) must name each tracker once"),
        ({"trackers": "wandb"}, r"logging\.trackers \('wandb'\) must be a list of texts"),
        ({"project": " "}, r"logging\.project \(' '\) must be a name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoggingConfig(**fields)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"wandb": {"id": "a"}}', '{"wandb": {"id": "a", "sent": {"x": "y"}, "in_use": true}}']
)
def test_a_damaged_state_is_named(tmp_path, base, packages, content):
    (tmp_path / "trackers.json").write_text(content)
    config = tracked(base, "damaged", trackers=["wandb"])
    with (
        pytest.raises(CheckpointError, match=r"trackers\.json"),
        open_log(tmp_path, total_updates=NUM_UPDATES, num_updates=1, config=config),
    ):
        pass
