"""Logging of a run: to the terminal, to TensorBoard, and to a file with one JSON line per event."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from memformer.errors import CheckpointError
from memformer.evaluation.likelihood import Result
from memformer.utils.files import sync_handle, write_text
from memformer.utils.progress import ProgressBar

# Values are numbers, strings, or lists with one number per timestep.
LoggedValues = dict[str, Any]

LOG_FILE = "log.jsonl"


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
        num_updates: Updates already completed. Later lines of an existing log are deleted, because the resumed run
            repeats them.
    """

    def __init__(self, folder: Path, *, num_updates: int) -> None:
        file = folder / LOG_FILE
        if file.exists():
            kept = [line for line in read_log(folder) if line["update"] <= num_updates]
            write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = file.open("a", encoding="utf-8")

    def record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        """Append a line."""
        self._lines.write(json.dumps({"kind": kind, "update": num_updates, **values}) + "\n")
        self._lines.flush()  # so that others can follow the run

    def sample(self, num_updates: int, text: str) -> None:
        """Do nothing; samples are saved in separate files."""

    def flush(self) -> None:
        """Flush the file and sync it to disk."""
        self._lines.flush()
        sync_handle(self._lines.fileno())

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class TensorBoardSink(LogSink):
    """Writes the values of events as TensorBoard scalars; a list becomes one scalar per timestep.

    Args:
        folder: The run folder.
        num_updates: Updates already completed. TensorBoard hides later events of an existing log.
    """

    def __init__(self, folder: Path, *, num_updates: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=num_updates + 1)

    def record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        """Write all numeric values as scalars."""
        for name, value in values.items():
            if isinstance(value, list):
                for timestep, each in enumerate(value):
                    self._writer.add_scalar(f"{kind}/{name}/{timestep}", each, num_updates)
            elif isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, num_updates)

    def sample(self, num_updates: int, text: str) -> None:
        """Write the text."""
        self._writer.add_text("sample", text, num_updates)

    def flush(self) -> None:
        """Flush the files."""
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


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
        for sink in self._sinks:
            sink.close()

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


def open_log(folder: Path, *, total_updates: int, num_updates: int) -> RunLog:
    """Open the log of a run: terminal, log.jsonl and TensorBoard files.

    Args:
        folder: The run folder.
        total_updates: Updates of the whole run.
        num_updates: Updates already completed.

    Raises:
        CheckpointError: The existing log is damaged.
        SaveError: The log cannot be written.
    """
    sinks = [JsonLinesSink(folder, num_updates=num_updates), TensorBoardSink(folder, num_updates=num_updates)]
    return RunLog(sinks, progress=ProgressBar("training", total_updates, unit="update", completed=num_updates))


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
        if isinstance(line, dict) and {"kind", "update"} <= line.keys():
            lines.append(line)
        elif number < len(raw_lines):
            raise CheckpointError(f"{file}: line {number} is damaged")
    return lines
