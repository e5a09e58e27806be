"""Processes that train runs side by side, and that end together."""

import subprocess
import threading
from collections.abc import Sequence
from typing import TextIO


class ChildProcesses:
    """Processes that are run from several threads.

    Attributes:
        are_stopped: Whether `stop` was called; then no new process begins.
    """

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self.are_stopped = False
        self._lock = threading.Lock()

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

    def stop(self, *, terminate: bool) -> None:
        """Begin no process any more; with `terminate`, ask those that run to save and end."""
        with self._lock:
            self.are_stopped = True
            for process in self._running if terminate else ():
                process.terminate()
