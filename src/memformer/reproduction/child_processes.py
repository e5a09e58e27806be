"""Processes that train runs side by side, and that end together."""

import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import TextIO

from memformer.utils.signals import Signals


class ChildProcesses:
    """Processes that are run from several threads; SIGTERM, Ctrl-C and an error that leaves the block end all of them.

    Args:
        signals: The signals that this process has received.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._running: list[subprocess.Popen[bytes]] = []
        self._has_failed = False
        self._is_passed_on = False
        self._lock = threading.Lock()

    @property
    def are_stopped(self) -> bool:
        """Whether a signal was received or an error occurred; then no new process begins."""
        return self._has_failed or bool(self._signals.received)

    def run(self, command: Sequence[str], log: TextIO) -> int | None:
        """Run a command to its end, with its output in a log; return its status, or None if it did not begin."""
        with self._lock:
            if self.are_stopped:
                return None
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self._running.append(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.remove(process)

    def pass_signal_on(self) -> None:
        """Ask the processes to save and end, once, if SIGTERM was received; on Ctrl-C, a terminal does so."""
        if not self._is_passed_on and self._signals.received[:1] == [signal.SIGTERM]:
            self._is_passed_on = True
            self._terminate()

    def _terminate(self) -> None:
        with self._lock:
            for process in self._running:
                process.terminate()

    def __enter__(self) -> "ChildProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self._has_failed = True
        if self._signals.received and kind is not KeyboardInterrupt:
            self.pass_signal_on()  # those that have got a signal save and end; a second one would end them unsaved
        else:
            self._terminate()
