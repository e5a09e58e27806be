"""Progress on stderr: a bar with the remaining time, or periodic lines if stderr is not a terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_PLAIN_LINES = 15.0


class ProgressBar:
    """A progress bar with a status text and the remaining time.

    Args:
        label: Name of the task, in one or two words.
        total: Total number of units.
        unit: Name of a unit, in the singular.
        completed: Units completed before the start; they do not count towards the speed.
    """

    def __init__(self, label: str, total: int, *, unit: str, completed: int = 0) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=completed, status="")
        self._label = label
        self._unit = unit
        self._total = total
        self._first = completed
        self._started = self._last_plain_line = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Show the bar."""
        self._progress.start()

    def stop(self) -> None:
        """Stop updating the bar."""
        self._progress.stop()

    def advance_to(self, completed: int, status: str | None = None) -> None:
        """Set the number of completed units and the status.

        Args:
            completed: Units completed.
            status: Text shown beside the bar. None: the speed in units per second.
        """
        now = time.monotonic()
        per_second = (completed - self._first) / max(now - self._started, 1e-9)
        if status is None:
            status = f"{per_second:,.0f} {self._unit}s/s"
        self._progress.update(self._task, completed=completed, status=status)
        if not self._console.is_terminal and now - self._last_plain_line > SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain_line = now
            left = (self._total - completed) / max(per_second, 1e-9)
            self.say(f"{self._label}: {self._unit} {completed:,}/{self._total:,}  {status}  about {left:,.0f} s left")

    def move_to(self, completed: int) -> None:
        """Set the number of completed units without changing the status."""
        self._progress.update(self._task, completed=completed)

    def say(self, message: str) -> None:
        """Print a line to stderr, above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a warning to stderr."""
    print(f"memformer: warning: {message}", file=sys.stderr)
