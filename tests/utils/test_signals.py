"""Signals that arrive at any moment stop the work."""

from memformer.utils.signals import Signals


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


def test_a_signal_to_another_thread_ends_the_wait():
    signals = Signals()

    def waiting():
        assert signals.keep_waiting()
        signals.received.append(2)
        signals.keep_waiting()
        yield 1

    assert list(signals.until_signalled(waiting(), waits=True)) == []
