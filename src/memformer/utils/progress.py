"""What a long reading says while it goes on, to stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_PLAIN_LINES = 15.0


class SegmentProgress:
    """A bar over segments with their speed and the time left; now and then a line where stderr is no terminal.

    Args:
        label: What is going on, in a word or two.
        num_segments: Segments of all of it.
    """

    def __init__(self, label: str, num_segments: int) -> None:
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
        self._task = self._progress.add_task("", total=num_segments, status="")
        self._label = label
        self._total = num_segments
        self._started = self._last_plain_line = time.monotonic()

    def __enter__(self) -> "SegmentProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance_to(self, num_segments: int) -> None:
        """Show that so many segments are done."""
        now = time.monotonic()
        per_second = num_segments / max(now - self._started, 1e-9)
        self._progress.update(self._task, completed=num_segments, status=f"{per_second:,.0f} segments/s")
        if not self._console.is_terminal and now - self._last_plain_line > SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain_line = now
            left = (self._total - num_segments) / max(per_second, 1e-9)
            self._console.print(
                f"{self._label}: segment {num_segments:,}/{self._total:,}  {per_second:,.0f} segments/s  "
                f"about {left:,.0f} s left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def print_warning(message: str) -> None:
    """Print a warning to stderr."""
    print(f"memformer: warning: {message}", file=sys.stderr)
