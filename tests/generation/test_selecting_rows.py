"""Rows of a session that are selected, repeated and reordered go on as streams of their own."""

import pytest
import torch

from memformer import InputError, InputTypeError, Session
from tests.generation.sessions import assert_same_state, random_tokens
from tests.generation.test_scoring import MODELS
from tests.helpers import SEGMENT_LENGTH, assert_close, tiny_model

PROMPTS = [random_tokens(count, seed=count) for count in (0, 5, 2 * SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 1)]


def fed(model, rows):
    session = Session(model, batch_size=len(rows))
    session.feed(rows if len(rows) > 1 else rows[0])
    return session


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, [3, 1, 1]) for name in MODELS),
        *((name, rows) for name in ("all options", "lstm") for rows in ([2], [2, 0, 3, 1], [1, 1, 3, 3, 0, 2])),
    ],
    ids=str,
)
def test_selected_rows_equal_streams_of_their_own(name, rows):
    """Whether or not some of their tokens were decoded, and when they go on with different tokens."""
    model = MODELS[name]()
    expected = fed(model, [PROMPTS[row] for row in rows])
    more = [random_tokens(4 + index, seed=index) for index in range(len(rows))]
    more = more if len(more) > 1 else more[0]
    sessions = [fed(model, PROMPTS) for _ in range(2)]
    sessions[1].next_token_logits()
    for session in sessions:
        session.select_rows(rows)
        assert session.batch_size == len(rows)
        assert_same_state(session, expected)
    expected.feed(more)
    for session in sessions:
        session.feed(more)
        assert_same_state(session, expected)
    assert sessions[1].generate(9, temperature=0) == expected.generate(9, temperature=0)


def test_beams_that_are_reordered_at_every_step_equal_streams_of_their_own():
    model = tiny_model()
    session = fed(model, [PROMPTS[3]])
    session.select_rows([0, 0, 0])
    texts = [list(PROMPTS[3])] * 3
    for step in range(3 * SEGMENT_LENGTH):
        order = torch.randint(0, 3, (3,), generator=torch.Generator().manual_seed(step))
        session.reorder(order)
        texts = [[*texts[row], (step + beam) % 7] for beam, row in enumerate(order.tolist())]
        session.feed([text[-1:] for text in texts])
        expected = fed(model, texts)
        assert_close(session.next_token_logits(), expected.next_token_logits())
    assert_same_state(session, expected)


def test_a_selected_session_is_saved_like_any_other(tmp_path):
    session = fed(tiny_model(), PROMPTS)
    session.select_rows([3, 3])
    session.save(tmp_path / "session")
    assert_same_state(Session.load(tmp_path / "session", model=session.model), session, relative=0)


def test_impossible_rows_are_refused_and_change_nothing():
    session = fed(tiny_model(), PROMPTS)
    for rows, message in (
        ([], "no rows are given"),
        ([4], r"row \(4\) must be from 0 to 3"),
        ([0, -1], r"row \(-1\) must be from 0 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            session.select_rows(rows)
    with pytest.raises(InputTypeError, match=r"row \(0.5\) must be an integer"):
        session.select_rows([0.5])
    with pytest.raises(InputError, match="a session of 4 rows cannot be reordered to 2; use select_rows"):
        session.reorder([0, 1])
    assert_same_state(session, fed(session.model, PROMPTS))


def test_generation_does_not_go_on_with_other_rows():
    session = fed(tiny_model(), PROMPTS)
    steps = session.stream(5)
    next(steps)
    session.reorder([1, 0, 2, 3])
    with pytest.raises(InputError, match="rows were selected during generation; call stream again"):
        next(steps)


def test_a_row_that_has_stopped_is_not_asked_for_its_tokens():
    """A grammar lets nothing follow its end, which must not end the other rows."""

    def allowed(row, num_tokens):
        return [5 + row] if num_tokens < 2 + 2 * row else [0] if num_tokens == 2 + 2 * row else []

    options = {"stop_token_ids": [0], "allowed_token_ids": allowed}
    assert Session(tiny_model(), batch_size=2).generate(20, **options) == [[5, 5, 0], [6, 6, 6, 6, 0]]
