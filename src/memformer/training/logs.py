"""Logging of a run: to the terminal, to trackers, and to a file with one JSON line per event."""

import contextlib
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from memformer.errors import CheckpointError, InputError
from memformer.evaluation.likelihood import Result
from memformer.training.config import RunConfig
from memformer.training.run_folder import LOG_FILE, RESULT_FILE
from memformer.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerStates, numbers_of
from memformer.utils.files import saving, sync_handle, write_text
from memformer.utils.progress import ProgressBar, print_warning

# Values are numbers, strings, or lists with one number per timestep.
LoggedValues = dict[str, Any]

SAMPLE = "sample"


class LogSink(ABC):
    """Base class of the destinations of log events."""

    @abstractmethod
    def record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        """Record an event.

        Args:
            kind: "training", "evaluation" or "skipped".
            num_updates: Updates completed at the event.
            values: The values to log, by name.
        """

    @abstractmethod
    def sample(self, num_updates: int, text: str) -> None:
        """Record a sample of generated text."""

    @abstractmethod
    def flush(self) -> None:
        """Write all recorded events to disk, so that they survive a crash."""

    @abstractmethod
    def close(self) -> None:
        """Close all files."""


class JsonLinesSink(LogSink):
    """Appends one JSON line per event to log.jsonl.

    Args:
        folder: The run folder.
        lines: Entries of the existing log (`read_log`), which is written again without later ones.
        num_updates: Updates already completed. Entries of later updates are deleted, because the resumed run repeats
            them.
    """

    def __init__(self, folder: Path, *, lines: Sequence[LoggedValues], num_updates: int) -> None:
        file = folder / LOG_FILE
        if file.exists():
            write_text(file, "".join(json.dumps(line) + "\n" for line in lines if line["update"] <= num_updates))
        self._file = file
        with saving(file):
            self._lines = file.open("a", encoding="utf-8")

    def record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        """Append a line."""
        with saving(self._file):
            self._lines.write(json.dumps({"kind": kind, "update": num_updates, **values}) + "\n")
            self._lines.flush()  # so that others can follow the run

    def sample(self, num_updates: int, text: str) -> None:
        """Do nothing; samples are saved in separate files."""

    def flush(self) -> None:
        """Flush the file and sync it to disk."""
        with saving(self._file):
            self._lines.flush()
            sync_handle(self._lines.fileno())

    def close(self) -> None:
        """Close the file."""
        with saving(self._file):
            self._lines.close()


class TrackerSink(LogSink):
    """Sends the numbers of events and the samples to a tracker, each of them once.

    A tracker that fails while the run trains gets nothing more; the run goes on, with one warning.

    Args:
        name: Name of the tracker, a key of `TRACKERS`.
        run: The run; its id is that of `states`.
        states: What the trackers have.

    Raises:
        InputError: The tracker's package is missing, or the tracker cannot start for a new run.
        SaveError: The states cannot be written.
    """

    def __init__(self, name: str, run: TrackedRun, states: TrackerStates) -> None:
        self._name = name
        self._states = states
        self._tracker: Tracker | None = None
        kind = TRACKERS[name]
        self._rewinds = kind.rewinds
        run_id, self._sent = ("", {}) if kind.rewinds else states.begin(name)
        try:
            self._tracker = kind(dataclasses.replace(run, id=run_id))
        except InputError:
            raise
        # The packages have errors of their own for a missing login, network or disk.
        except Exception as error:
            if not run.num_updates:
                raise InputError(f"the tracker {name!r} of logging.trackers cannot start: {error}") from error
            self._give_up(error)
            return
        newest = max(self._sent.values(), default=0)
        if newest > run.num_updates:
            print_warning(
                f"{name} has the numbers up to update {newest:,} from before; those of the updates repeated now "
                "are not sent again"
            )

    def record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        """Send all numbers of an event."""
        numbers = numbers_of(kind, values)
        self._send(kind, num_updates, lambda tracker: tracker.log(num_updates, numbers))

    def sample(self, num_updates: int, text: str) -> None:
        """Send the text."""
        self._send(SAMPLE, num_updates, lambda tracker: tracker.log_text(num_updates, SAMPLE, text))

    def flush(self) -> None:
        """Flush the tracker's files."""
        self._try(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Finish the tracker's run."""
        if self._tracker is not None and self._try(lambda tracker: tracker.finish()):
            self._end()

    def _send(self, kind: str, num_updates: int, send: Callable[[Tracker], None]) -> None:
        if num_updates > self._sent.get(kind, 0) and self._try(send) and not self._rewinds:
            self._sent[kind] = num_updates

    def _try(self, act: Callable[[Tracker], None]) -> bool:
        """Return whether the tracker did it."""
        if self._tracker is None:
            return False
        try:
            act(self._tracker)
        except Exception as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        print_warning(
            f"the tracker {self._name!r} failed and gets nothing more of this run, which goes on: "
            f"{type(error).__name__}: {error}"
        )
        self._end()

    def _end(self) -> None:
        self._tracker = None
        if not self._rewinds:
            self._states.end(self._name, self._sent)


class RunLog:
    """Sends the events of a run to its sinks and prints a summary to the terminal.

    Args:
        sinks: Destinations of the events; only the first of several processes has sinks.
        progress: Progress bar over updates, which also prints messages. None: print nothing.
    """

    def __init__(self, sinks: Sequence[LogSink] = (), *, progress: ProgressBar | None = None) -> None:
        self._sinks = sinks
        self._progress = progress
        self._status = "first updates"

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        with contextlib.ExitStack() as stack:  # if one of them fails, the others are closed all the same
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def advance(self, num_updates: int, *, seconds_left: float) -> None:
        """Move the progress bar, and set the remaining time in seconds."""
        if self._progress is not None:
            self._progress.advance_to(num_updates, self._status, seconds_left=seconds_left)

    def end_updates(self) -> None:
        """Remove the progress bar of the updates; messages are still printed."""
        if self._progress is not None:
            self._progress.stop()

    def update(self, num_updates: int, values: LoggedValues) -> None:
        """Log a training update."""
        self._record("training", num_updates, values)
        self._status = (
            f"{values['bits_per_token']:.3f} bits/token  {values['tokens_per_second']:,.0f} tokens/s  "
            f"{values['peak_memory_bytes'] / 2**20:,.0f} MiB"
        )

    def evaluation(self, num_updates: int, result: Result) -> None:
        """Log an evaluation on held-out documents or episodes."""
        self._record("evaluation", num_updates, result.to_log())
        self.say(f"update {num_updates}: {result.to_line()}")

    def skipped(self, num_updates: int, reason: str, *, num_skipped: int) -> None:
        """Log a skipped update, the `num_skipped`-th of the run."""
        self._record("skipped", num_updates, {"reason": reason, "skipped_updates": num_skipped})
        self.say(f"update {num_updates} was skipped ({num_skipped} so far): {reason}")

    def sample(self, num_updates: int, text: str) -> None:
        """Log a sample of generated text."""
        for sink in self._sinks:
            sink.sample(num_updates, text)

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar."""
        if self._progress is not None:
            self._progress.say(message)

    def flush(self) -> None:
        """Write all logged events to disk, so that they survive a crash."""
        for sink in self._sinks:
            sink.flush()

    def _record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        for sink in self._sinks:
            sink.record(kind, num_updates, values)


def open_log(folder: Path, *, total_updates: int, num_updates: int, config: RunConfig | None = None) -> RunLog:
    """Open the log of a run: terminal, log.jsonl and the trackers of the config.

    Args:
        folder: The run folder.
        total_updates: Updates of the whole run.
        num_updates: Updates already completed.
        config: The run's config. None: no trackers.

    Raises:
        InputError: A tracker's package is missing, or a tracker cannot start.
        CheckpointError: The existing log or state of the trackers is damaged.
        SaveError: The log cannot be written.
    """
    with contextlib.ExitStack() as opened:
        # The log of a killed process shows how much the trackers have received, so they are opened before it is cut.
        lines = read_log(folder) if (folder / LOG_FILE).exists() else []
        trackers = [] if config is None else _open_trackers(config, folder, num_updates, lines, opened)
        sinks = [JsonLinesSink(folder, lines=lines, num_updates=num_updates), *trackers]
        opened.pop_all()
    return RunLog(sinks, progress=ProgressBar("training", total_updates, unit="update", completed=num_updates))


def _open_trackers(
    config: RunConfig,
    folder: Path,
    num_updates: int,
    lines: Sequence[LoggedValues],
    opened: contextlib.ExitStack,
) -> list[TrackerSink]:
    logged: dict[str, int] = {line["kind"]: line["update"] for line in lines}
    # Samples are no lines of the log; they follow evaluations.
    states = TrackerStates(folder, logged={**logged, SAMPLE: logged.get("evaluation", 0)})
    run = TrackedRun(
        folder=folder,
        name=folder.resolve().name,
        project=config.logging.project,
        config=config.to_dict(),
        id="",
        num_updates=num_updates,
    )
    sinks = []
    for name in config.logging.trackers:
        sinks.append(TrackerSink(name, run, states))
        opened.callback(sinks[-1].close)
    return sinks


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log; an incomplete last line, left by a crash, is ignored.

    Raises:
        CheckpointError: The file cannot be read, or another line is damaged.
    """
    file = folder / LOG_FILE
    try:
        raw_lines = file.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    lines = []
    for number, raw in enumerate(raw_lines, start=1):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if isinstance(line, dict) and type(line.get("kind")) is str and type(line.get("update")) is int:
            lines.append(line)
        elif number < len(raw_lines):
            raise CheckpointError(f"{file}: line {number} is damaged")
    return lines


def missing_value_sentence(folder: Path, error: Exception | str) -> str:
    """Return the message about a run whose log or evaluation lacks a value, which `error` names."""
    return f"{LOG_FILE} or {RESULT_FILE} in {folder} lacks a value: {error}"
