"""The processes of runs: all of them end when something goes wrong, and what ended one is said."""

import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from memformer.errors import InputError
from memformer.reproduction import child_processes, runs
from memformer.reproduction.child_processes import ChildProcesses
from memformer.reproduction.runs import Run, check_train_options, finish_runs, trained_seeds
from memformer.reproduction.tables import Row
from memformer.utils.signals import Signals


@pytest.fixture
def planned(tmp_path):
    return [Run(name="LSTM", seed=seed, folder=tmp_path / f"run-{seed}", config={}) for seed in range(3)]


@pytest.fixture
def started(monkeypatch):
    """Processes that were begun; each runs until it is ended by a signal."""
    started = []

    class Process:
        def __init__(self, command, stdout, stderr):
            started.append(self)
            self.command, self.status, self.is_ended = command, None, threading.Event()
            self.num_signals = 0

        def end(self, status):
            self.status = status
            self.is_ended.set()

        def terminate(self):
            self.num_signals += 1
            self.end(-15)

        def wait(self):
            assert self.is_ended.wait(60)
            return self.status

    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=Process, STDOUT=subprocess.STDOUT))
    return started


def test_an_error_beside_the_runs_ends_them_all(planned, started, monkeypatch):
    """A closed stderr, for example; the runs would go on for hours, and nothing would be written of them."""

    class Bar(runs.ProgressBar):
        def advance_to(self, completed, status):
            if started:
                raise BrokenPipeError

    monkeypatch.setattr(runs, "ProgressBar", Bar)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    with pytest.raises(BrokenPipeError):
        finish_runs(planned, jobs=1, options=[])
    assert [process.status for process in started] == [-15]


def test_an_error_in_the_thread_of_a_run_ends_them_all(planned, started, monkeypatch):
    """Of a closed stderr, rich makes a SystemExit in the thread that writes first."""

    class Bar(runs.ProgressBar):
        def say(self, message):
            if "seed 0: started" in message:
                raise SystemExit(1)

    monkeypatch.setattr(runs, "ProgressBar", Bar)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(Run, "prepare_training", lambda run, options: [])
    with pytest.raises(SystemExit):
        finish_runs(planned, jobs=1, options=[])
    # The next run may have begun before the error was seen; the last one did not.
    assert [process.status for process in started] in ([], [-15])


@pytest.mark.parametrize(("received", "ended"), [([signal.SIGTERM], [-15]), ([signal.SIGINT], [None])])
def test_an_error_after_a_signal_sends_no_second_one(planned, started, monkeypatch, received, ended):
    """The runs save because of the first; a second one would end them unsaved."""
    signals = Signals()
    processes = ChildProcesses(signals)
    thread = threading.Thread(target=processes.run, args=([], None))
    thread.start()
    while not processes._running:
        time.sleep(0.001)
    (process,) = started
    signals.received += received
    processes.pass_signal_on()
    processes.__exit__(BrokenPipeError, None, None)
    assert [process.status] == ended
    assert process.num_signals == len([status for status in ended if status])
    process.end(0)
    thread.join()


def test_a_run_that_the_system_ended_is_reported_as_such(planned, started, monkeypatch):
    class Killed(child_processes.ChildProcesses):
        def run(self, command, log):
            log.write("update 400: held out 1.0\n")
            return -9

    monkeypatch.setattr(runs, "ChildProcesses", Killed)
    with pytest.raises(InputError) as raised:
        finish_runs(planned[:1], jobs=1, options=[])
    folder = planned[0].folder
    assert str(raised.value) == (
        f"1 of 1 runs failed; the process that trained {folder} was ended by SIGKILL; "
        "the system does this when memory runs out: try fewer --jobs"
    )


def test_the_seeds_of_a_table_are_those_of_its_rows(tmp_path):
    rows = [Row(key=key, name=key, model_type="lstm", scales={}) for key in ("1-lstm", "2-seed-lstm")]
    assert trained_seeds(rows, tmp_path / "none") == []
    for name in ("1-lstm-seed-10", "2-seed-lstm-seed-2", "3-other-seed-5", "1-lstm-seed-x", "1-lstm-seed-7.yaml"):
        (tmp_path / name).mkdir()
    assert trained_seeds(rows, tmp_path) == [2, 10]


def test_options_of_single_runs_are_refused():
    check_train_options(["--seedling", "--training.num_updates=3"])
    with pytest.raises(InputError, match="--folder cannot be an option of every run: every run has its own folder"):
        check_train_options(["--training.num_updates=3", "--folder=x"])
