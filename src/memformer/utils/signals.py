"""SIGINT and SIGTERM while work goes on that must not be cut in two: its piece is finished, then all is saved."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Interrupted(Exception):
    """Work was asked to stop, has saved what it had, and stopped.

    Args:
        signal_number: The signal that asked.
        what_now: Where it is saved, and how to go on.
    """

    def __init__(self, signal_number: int, what_now: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {what_now}")
        self.signal_number = signal_number


class _NoMoreWaiting(BaseException):
    """Raised in what waits for the next item."""


class Signals:
    """The signals that were noted.

    Attributes:
        received: Their numbers.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._is_waiting = False

    def note(self, number: int) -> None:
        """Note a signal; end what waits for the next item.

        Raises:
            _NoMoreWaiting: An item is waited for.
        """
        self.received.append(number)
        if self._is_waiting:
            raise _NoMoreWaiting

    def until_signalled(self, items: Iterable[Item], *, waits: bool = False) -> Iterator[Item]:
        """Yield items until a signal arrives.

        Args:
            items: What is worked through.
            waits: The next item is waited for, perhaps for ever: a signal ends that at once. Else it is finished.
        """
        iterator = iter(items)
        while not self.received:
            self._is_waiting = waits
            try:
                item = next(iterator)
            except (StopIteration, _NoMoreWaiting):
                return
            finally:
                self._is_waiting = False
            yield item


@contextmanager
def signals_noted() -> Iterator[Signals]:
    """Note the first SIGINT or SIGTERM so that work can be finished; a second one acts at once."""
    signals = Signals()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        signals.note(number)

    try:
        for asked in (signal.SIGINT, signal.SIGTERM):
            previous[asked] = signal.signal(asked, note)
    except ValueError:
        previous.clear()  # not in the main thread: signals are not ours to take
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
