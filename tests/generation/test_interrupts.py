"""A call of a session that is interrupted or fails leaves the state of the tokens that the session counts."""

import copy

import pytest

from memformer import InputError, Session
from tests.generation.sessions import random_tokens
from tests.helpers import SEGMENT_LENGTH, assert_close, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline

MODELS = {
    "memformer": tiny_model,
    "separate": lambda: tiny_model(decoder_attention="separate", decoder_start_tokens=0),
    **{name: lambda name=name: tiny_baseline(name) for name in BASELINES},
}
# Models that are interrupted before and after a computation, while they are fed and while they score.
EVERY_WAY = ("memformer", "lstm", "compressive")
COUNTS = (3, 2 * SEGMENT_LENGTH + 3, SEGMENT_LENGTH - 3, 1, 5 * SEGMENT_LENGTH)


class Interrupts:
    """Raises KeyboardInterrupt in the n-th computation of a model, before it or after it."""

    def __init__(self, model, monkeypatch, *, at, is_late):
        self.left, self.is_late, self.was_raised = at, is_late, False
        for name in ("encode", "decode_step"):
            if hasattr(model, name):
                monkeypatch.setattr(model, name, self.around(getattr(model, name)))

    def around(self, function):
        def call(*arguments, **options):
            self.left -= 1
            is_due = self.left == 0
            if is_due and not self.is_late:
                self.stop()
            result = function(*arguments, **options)
            if is_due:
                self.stop()
            return result

        return call

    def stop(self):
        self.was_raised = True
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "call", "when"),
    [
        *((name, "feed", "before") for name in MODELS),
        *((name, "score", "after") for name in MODELS),
        *((name, *each) for name in EVERY_WAY for each in (("feed", "after"), ("score", "before"))),
    ],
)
def test_an_interrupted_session_is_in_the_state_of_the_tokens_that_it_counts(name, call, when, monkeypatch, tmp_path):
    model = MODELS[name]()
    tokens = random_tokens(sum(COUNTS))
    at, was_raised = 1, True
    while was_raised:
        session, position = Session(model), 0
        with monkeypatch.context() as patch:
            interrupts = Interrupts(model, patch, at=at, is_late=when == "after")
            try:
                for count in COUNTS:
                    getattr(session, call)(tokens[position : position + count])
                    position += count
                    session.next_token_logits()
            except KeyboardInterrupt:
                pass
            was_raised = interrupts.was_raised
        expected = Session(model)
        expected.feed(tokens[: session.num_tokens[0]])
        session.save(tmp_path / "state")
        for found in (session, copy.deepcopy(session), Session.load(tmp_path / "state", model=model)):
            assert_close(found.next_token_logits(), expected.next_token_logits())
            assert_close(found.memory, expected.memory)
        at += 1
    assert at > 8


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_generation_continues_as_if_it_had_not_been(name, monkeypatch):
    model = MODELS[name]()
    whole = Session(model)
    whole.feed([1, 2])
    greedy = whole.generate(2 * SEGMENT_LENGTH, temperature=0)
    for at in range(1, 3 * SEGMENT_LENGTH):
        session = Session(model)
        session.feed([1, 2])
        with monkeypatch.context() as patch:
            interrupts = Interrupts(model, patch, at=at, is_late=True)
            try:
                session.generate(2 * SEGMENT_LENGTH, temperature=0)
            except KeyboardInterrupt:
                done = session.num_tokens[0] - 2
                assert session.generate(2 * SEGMENT_LENGTH - done, temperature=0) == greedy[done:]
        if not interrupts.was_raised:
            return
    raise AssertionError("the generation was never finished")


@pytest.mark.parametrize("rows", [[1, 0], [0]])
def test_rows_are_selected_after_an_interrupt(rows, monkeypatch):
    """A row whose segment was taken but not read is read first."""
    model = tiny_model()
    fed = [random_tokens(SEGMENT_LENGTH + 2, seed=1), random_tokens(3, seed=2)]
    expected = Session(model, batch_size=2)
    session = Session(model, batch_size=2)
    with monkeypatch.context() as patch:
        Interrupts(model, patch, at=1, is_late=False)
        with pytest.raises(KeyboardInterrupt):
            session.feed(fed)
    assert session.num_tokens == [SEGMENT_LENGTH, 3]
    session.select_rows(rows)
    expected.feed([fed[0][:SEGMENT_LENGTH], fed[1]])
    expected.select_rows(rows)
    assert_close(session.next_token_logits(), expected.next_token_logits())


def test_a_session_that_was_interrupted_while_its_state_changed_says_so(monkeypatch, tmp_path):
    """This takes microseconds; then neither the state before nor the one after is there."""
    session = Session(tiny_model())
    with monkeypatch.context() as patch:

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(session._streams.context, "begin_segment", stop)
        with pytest.raises(KeyboardInterrupt):
            session.feed(random_tokens(SEGMENT_LENGTH))
    for call in (
        lambda: session.feed([1]),
        lambda: session.score([1]),
        session.next_token_logits,
        lambda: session.save(tmp_path / "state"),
        lambda: session.select_rows([0]),
    ):
        with pytest.raises(InputError, match="interrupted while its state changed, and the state is lost"):
            call()
    assert not (tmp_path / "state").exists()
