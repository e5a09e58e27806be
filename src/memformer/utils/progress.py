"""Progress on stderr: a bar with the remaining time, or periodic lines if stderr is not a terminal.

Work that takes less than a second shows nothing.
"""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

SECONDS_BEFORE_BAR = 1.0
SECONDS_BETWEEN_PLAIN_LINES = 15.0
FIRST_PLAIN_LINE_AFTER = 5.0


class ProgressBar:
    """A progress bar with a status text and the remaining time.

    Args:
        label: Name of the task, in one or two words.
        total: Total number of units. None: unknown, so no remaining time is shown.
        unit: Name of a unit, in the singular.
        completed: Units completed before the start; they do not count towards the speed.
    """

    def __init__(self, label: str, total: int | None, *, unit: str, completed: int = 0) -> None:
        self._is_live = is_terminal()
        self._is_shown = False
        self._console = Console(stderr=True, force_terminal=self._is_live)
        self._progress = Progress(
            *(_column("label"), _column("count"), BarColumn(bar_width=None), _column("status"), _column("left")),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=total, completed=completed, label=label, count="", status="", left=""
        )
        self._label = label
        self._unit = unit
        self._total = total
        self._first = self._completed = completed
        self._status: str | None = None
        self._started = time.monotonic()
        self._last_plain_line = self._started - SECONDS_BETWEEN_PLAIN_LINES + FIRST_PLAIN_LINE_AFTER

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop updating the bar."""
        if self._is_shown:
            self._progress.stop()

    def begin_at(self, completed: int) -> None:
        """Leave the units completed so far, and the time until now, out of the speed."""
        self._first = self._completed = completed
        self._started = time.monotonic()

    def advance(self, number: int) -> None:
        """Add to the number of completed units."""
        self.advance_to(self._completed + number)

    def advance_to(self, completed: int, status: str | None = None, *, seconds_left: float | None = None) -> None:
        """Set the number of completed units, the status and the remaining time.

        Args:
            completed: Units completed.
            status: Text shown beside the bar. None: the last one, or if there was none, the speed in units per second.
            seconds_left: Remaining time. None: estimated from the speed.
        """
        now = time.monotonic()
        self._completed = completed
        self._status = status or self._status
        per_second = (completed - self._first) / max(now - self._started, 1e-9)
        status = self._status or f"{per_second:,.0f} {self._unit}s/s"
        if seconds_left is None and self._total is not None and per_second > 0:
            seconds_left = max(self._total - completed, 0) / per_second
        left = "" if seconds_left is None else f"about {format_seconds(seconds_left)} left"
        count = f"{completed:,}" if self._total is None else f"{completed:,}/{self._total:,}"
        if self._is_live:
            self._progress.update(self._task, completed=completed, count=count, status=status, left=left)
            if now - self._started >= SECONDS_BEFORE_BAR:
                self._is_shown = True
                self._progress.start()
        elif now - self._last_plain_line >= SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain_line = now
            self.say(f"{self._label}: {self._unit} {count}  {status}  {left}".rstrip())

    def say(self, message: str) -> None:
        """Print a line to stderr, above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def _column(field: str) -> TextColumn:
    # Cropped in a narrow window: a wrapped bar would leave a line behind at every change.
    return TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))


def is_terminal() -> bool:
    """Return whether stderr is a terminal on which a line can be drawn again."""
    is_tty = sys.stderr is not None and sys.stderr.isatty()
    return is_tty and os.environ.get("TERM", "") not in {"dumb", "unknown"}


def format_seconds(seconds: float) -> str:
    """Return a duration as text: 95 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def print_warning(message: str) -> None:
    """Print a warning to stderr."""
    print(f"memformer: warning: {message}", file=sys.stderr)
