"""Generation for the evaluation harness: stop strings, ends of documents, and options of sampling."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.lm_eval import MemformerLM
from memformer.lm_eval.generating import check_generation, generate
from tests.lm_eval.models import TEXT, requests_of, save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return MemformerLM(save(tmp_path_factory.mktemp("models") / "ends", ends=True), device="cpu", batch_size=2)


def texts(model, *contexts, **options):
    return model.generate_until(requests_of(*[(context, options) for context in contexts]), disable_tqdm=True)


class Scripted(Session):
    """Stands in for a session that generates given bytes."""

    stop_token_ids = frozenset({256})

    def __init__(self, *rows):
        self.rows, self.num_steps = rows, 0

    @property
    def batch_size(self):
        return len(self.rows)

    def stream(self, max_new_tokens, **sampling):
        for step in list(zip(*self.rows, strict=True))[:max_new_tokens]:
            self.num_steps += 1
            yield list(step)


def scripted(model, rows, **options):
    session = Scripted(*rows)
    return generate(session, model.run.tokenizer, check_generation(options)), session.num_steps


def test_a_row_ends_before_the_first_stop_string(model):
    rows = [b"one. two\nthree", b"abcdefghijklmn"]
    assert scripted(model, rows, until=[".", "\n", ""])[0] == ["one", "abcdefghijklmn"]
    assert scripted(model, rows, until="wo\n")[0] == ["one. t", "abcdefghijklmn"]
    assert scripted(model, rows, until=["one", "b"]) == (["", "a"], 3)  # no more steps than are needed
    assert scripted(model, rows, until=[], max_gen_toks=4)[0] == ["one.", "abcd"]
    assert scripted(model, ["é–ü".encode()], until=["ü"])[0] == ["é–"]


def test_a_row_ends_at_the_end_of_the_document(model):
    assert scripted(model, [[97, 256, 256, 256], [98, 99, 100, 256]]) == (["a", "bcd"], 4)
    assert scripted(model, [[97, 256, 98], [98, 256, 97]]) == (["a", "b"], 2)


def test_options_that_the_harness_cannot_read_are_refused():
    for options in ({"max_gen_toks": "abc"}, {"temperature": "x"}):
        with pytest.raises(InputError, match=r"the generation options .* are refused"):
            check_generation(options)


def test_greedy_generation_equals_a_session(model):
    session = Session(model.run.model)
    session.feed(list(TEXT.encode()))
    expected = model.run.tokenizer.decode(session.generate(12, temperature=0)).decode(errors="replace")
    for options in (
        {},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.0},
        {"do_sample": True, "top_k": 1},
    ):
        assert texts(model, TEXT, max_gen_toks=12, **options) == [expected]


def test_sampling_options_reach_the_session(model, monkeypatch):
    seen = []
    stream = Session.stream
    monkeypatch.setattr(
        Session, "stream", lambda *args, **kwargs: seen.append((args[1], kwargs)) or stream(*args, **kwargs)
    )
    texts(model, "a", do_sample=True, temperature=0.5, top_p=0.9, top_k=7, max_gen_toks=3)
    texts(model, "a", do_sample=True, top_k=0, max_new_tokens=2)
    texts(model, "a", temperature=0.3, max_gen_toks=1)
    assert seen == [
        (3, {"temperature": 0.5, "top_k": 7, "top_p": 0.9}),
        (2, {"temperature": 1.0, "top_k": None, "top_p": None}),
        (1, {"temperature": 0.3, "top_k": None, "top_p": None}),
    ]
    assert check_generation({}).max_new_tokens == 256


def test_repeated_requests_are_sampled_separately_and_the_seed_decides(model):
    def draw():
        torch.manual_seed(5)
        return texts(model, *["The"] * 4, do_sample=True, max_gen_toks=8)

    assert len(set(draw())) == 4
    assert draw() == draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.1}, "generation option 'repetition_penalty' is not supported"),
        ({"num_beams": 4}, r"num_beams \(4\) must be 1"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
        ({"max_gen_toks": -1}, "max_gen_toks"),
        ({"until": [3]}, r"until \(\[3\]\) must be a text"),
    ],
)
def test_options_that_are_not_supported_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        texts(model, "a", **options)
