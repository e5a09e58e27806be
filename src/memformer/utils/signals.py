"""Deferred handling of SIGINT and SIGTERM: the current step is finished and saved before the program stops."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


class Interrupted(Exception):
    """Raised when a signal stopped the work, after its state was saved.

    Args:
        signal_number: The signal received.
        what_now: Where the state is saved, and how to continue.
    """

    def __init__(self, signal_number: int, what_now: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {what_now}")
        self.signal_number = signal_number


class _StopWaiting(BaseException):
    """Raised by the signal handler to end the wait for the next item."""


class Signals:
    """Records received signals.

    Attributes:
        received: The signal numbers, in order of arrival.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._is_waiting = False

    def note(self, number: int) -> None:
        """Record a signal; interrupt `until_signalled` if it is waiting for the next item.

        Raises:
            _StopWaiting: `until_signalled` is waiting for the next item.
        """
        self.received.append(number)
        if self._is_waiting:
            raise _StopWaiting

    def until_signalled(self, items: Iterable[Item], *, waits: bool = False) -> Iterator[Item]:
        """Yield items until a signal arrives.

        Args:
            items: The items to yield.
            waits: Whether producing an item may block indefinitely (reading stdin). A signal then interrupts it at
                once; otherwise the current item is finished first.
        """
        iterator = iter(items)
        while True:
            try:
                # In this order, a signal is seen at any moment.
                self._is_waiting = waits
                if self.received:
                    return
                item = next(iterator)
            except (StopIteration, _StopWaiting):
                return
            finally:
                self._is_waiting = False
            yield item


@contextmanager
def signals_noted() -> Iterator[Signals]:
    """Record the first SIGINT or SIGTERM instead of stopping; a second one takes effect at once.

    Yields:
        The recorded signals.
    """
    signals = Signals()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        signals.note(number)

    try:
        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, note)
    except ValueError:
        previous.clear()  # outside the main thread, Python does not allow signal handlers
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
