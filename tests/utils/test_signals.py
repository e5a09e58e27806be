"""Signals that arrive at any moment stop the work."""

import io
import os
import signal
import threading

from memformer.cli.prompts import open_input
from memformer.data import ByteTokenizer
from memformer.utils.signals import Signals, signals_noted


class Arriving(list):
    """Signals received, one of which arrives just after somebody has looked whether there is one."""

    def __init__(self, signals):
        super().__init__()
        self.signals = signals

    def __bool__(self):
        found = len(self) > 0
        if not found:
            self.signals.note(15)
        return found


def never():
    raise AssertionError("the next item would have been waited for")
    yield


def test_a_signal_between_looking_for_one_and_waiting_is_not_lost():
    signals = Signals()
    signals.received = Arriving(signals)
    assert list(signals.until_signalled(never(), waits=True)) == []
    assert list(signals.received) == [15]


def test_a_signal_to_another_thread_ends_the_wait(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as waiting, signals_noted() as signals:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(waiting))
        sender = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        sender.start()
        with open_input("-") as text:
            assert list(signals.until_signalled(text.pieces(ByteTokenizer()), waits=True)) == []
        sender.join()
        os.close(writer)
    assert signals.received == [signal.SIGINT]
