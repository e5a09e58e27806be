"""What a run says while it goes on: a progress bar, TensorBoard, and one JSON line per event."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from memformer.errors import CheckpointError
from memformer.evaluation.likelihood import Result
from memformer.utils.files import write_text
from memformer.utils.progress import SECONDS_BETWEEN_PLAIN_LINES

# A figure, or one for each timestep.
LoggedValues = dict[str, Any]

LOG_FILE = "log.jsonl"


class RunLog:
    """Reports to the terminal (stderr), to TensorBoard and to log.jsonl; on resuming, goes on after `num_updates`.

    Args:
        folder: The run folder.
        total_updates: Updates of the whole run.
        num_updates: Updates done before; later lines of an existing log are dropped, they will be made again.
    """

    def __init__(self, folder: Path, *, total_updates: int, num_updates: int) -> None:
        self._file = folder / LOG_FILE
        if self._file.exists():
            kept = [line for line in read_log(folder) if line["update"] <= num_updates]
            write_text(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = self._file.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=num_updates + 1)
        self._console = Console(stderr=True)
        self._last_plain_line = 0.0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_updates, completed=num_updates, status="")
        self._total = total_updates

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._lines.close()
        self._writer.close()

    def advance(self, num_updates: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=num_updates)

    def update(self, num_updates: int, values: LoggedValues) -> None:
        """Log a training update."""
        self._record("training", num_updates, values)
        status = (
            f"{values['bits_per_token']:.3f} bits/token  {values['tokens_per_second']:,.0f} tokens/s  "
            f"{values['peak_memory_bytes'] / 2**20:,.0f} MiB"
        )
        self._progress.update(self._task, completed=num_updates, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_plain_line > SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain_line = now
            left = (self._total - num_updates) * values["seconds"] / max(num_updates, 1)
            self.say(f"update {num_updates}/{self._total}  {status}  about {left:,.0f} s left")

    def evaluation(self, num_updates: int, result: Result) -> None:
        """Log an evaluation on what is held out."""
        self._record("evaluation", num_updates, result.to_log())
        self.say(f"update {num_updates}: {result.to_line()}")

    def skipped(self, num_updates: int, reason: str, *, num_skipped: int) -> None:
        """Log an update that was skipped; they are counted from the beginning of the run."""
        self._lines.write(json.dumps({"kind": "skipped", "update": num_updates, "reason": reason}) + "\n")
        self._writer.add_scalar("training/skipped_updates", num_skipped, num_updates)
        self.say(f"update {num_updates} was skipped ({num_skipped} so far): {reason}")

    def sample(self, num_updates: int, text: str) -> None:
        """Log a sample of generated text."""
        self._writer.add_text("sample", text, num_updates)

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Make what was logged so far survive a crash."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._writer.flush()

    def _record(self, kind: str, num_updates: int, values: LoggedValues) -> None:
        self._lines.write(json.dumps({"kind": kind, "update": num_updates, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                for timestep, each in enumerate(value):
                    self._writer.add_scalar(f"{kind}/{name}/{timestep}", each, num_updates)
            else:
                self._writer.add_scalar(f"{kind}/{name}", value, num_updates)


class NoLog(RunLog):
    """What the other processes of a run log: nothing."""

    def __init__(self, folder: Path, *, total_updates: int, num_updates: int) -> None:
        """Open nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self, num_updates: int) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def skipped(self, num_updates: int, reason: str, *, num_skipped: int) -> None:
        """Do nothing."""

    def update(self, num_updates: int, values: LoggedValues) -> None:
        """Do nothing."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that a crash cut short is left out.

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
