"""The model `memformer` of the evaluation harness equals a session, `evaluate`, and the harness's own hf model."""

import random

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.models.huggingface import HFLM

from memformer import evaluate
from memformer.data import Document, TokenizerConfig, corpus_from_arrays, save_tokenizer, train_tokenizer
from memformer.data.tokenizer_training import word_tokenizer
from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.hf import export as exporting
from memformer.lm_eval import MemformerLM, scoring
from tests.helpers import tiny_model
from tests.lm_eval.models import LENGTH, TEXT, requests_of, save

CUTS = [0, 1, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 90, 91, len(TEXT) - 1]
PAIRS = [(TEXT[:cut], TEXT[cut:]) for cut in CUTS]
GREEDY = {"max_gen_toks": 6, "until": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "default")


@pytest.fixture(scope="module")
def model(folder):
    return MemformerLM(folder, device="cpu", batch_size=3)


def test_the_arguments_of_the_model_count_more_than_options_of_the_harness(tmp_path, monkeypatch):
    """The harness always passes its device and batch size too; it takes the folder 2024 for a number."""
    save(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    others = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    for make, given in (
        (MemformerLM.create_from_arg_obj, {"pretrained": 2024, "device": "cpu", "batch_size": 8}),
        (MemformerLM.create_from_arg_string, "pretrained=2024,device=cpu,batch_size=8"),
    ):
        model = make(given, others)
        assert (model.batch_size, model.device.type, str(model.run.folder)) == (8, "cpu", "2024")


def bytes_of(text):
    return list(text.encode())


@pytest.mark.parametrize("baseline", [None, "lstm, adaptive softmax", "compressive, uneven"])
def test_rolling_equals_evaluate_of_the_core(baseline, tmp_path):
    model = MemformerLM(save(tmp_path / "model", baseline=baseline), device="cpu", batch_size=2)
    texts = [TEXT, "a", TEXT[:50], "", TEXT[30:]]
    found = model.loglikelihood_rolling(requests_of(*texts), disable_tqdm=True)
    for text, nats in zip(texts, found, strict=True):
        if text:
            corpus = corpus_from_arrays([bytes_of(text)], vocab_size=256)
            assert -nats == pytest.approx(evaluate(model.run.model, corpus).with_memory.nll, abs=1e-6)
        else:
            assert nats == 0
    pairs = model.loglikelihood(requests_of(*[("", text) for text in texts]), disable_tqdm=True)
    assert [nats for nats, _ in pairs] == pytest.approx(found, abs=1e-8)


def test_a_text_has_the_same_values_wherever_it_is_cut(model):
    session = Session(model.run.model)
    nll = session.score(bytes_of(TEXT))
    best = Session(model.run.model).token_logits(bytes_of(TEXT)).argmax(-1)
    order = random.Random(1).sample([*range(0, len(TEXT), 16), *CUTS], 20)
    pairs = requests_of(*[(TEXT[:cut], TEXT[cut:]) for cut in order])
    found = model.loglikelihood(pairs, disable_tqdm=True)
    for cut, (nats, is_greedy) in zip(order, found, strict=True):
        start = len(TEXT[:cut].rstrip().encode())  # spaces at the end of a context are the continuation's
        assert nats == pytest.approx(-nll[start:].sum().item(), abs=1e-8)
        assert is_greedy == bool((best[start:] == torch.tensor(bytes_of(TEXT))[start:]).all())


def test_what_greedy_decoding_generates_is_greedy(folder):
    model = MemformerLM(folder, device="cpu")
    session = Session(model.run.model)
    session.feed(bytes_of("The ship"))
    ids = session.generate(9, temperature=0)
    logits = Session(model.run.model)
    logits.feed(bytes_of("The ship"))
    ((_, is_greedy),) = scoring.nats_and_greedy(logits, [torch.tensor(ids).numpy()])
    assert is_greedy
    other = Session(model.run.model)
    other.feed(bytes_of("The ship"))
    ids[4] ^= 1
    assert not scoring.nats_and_greedy(other, [torch.tensor(ids).numpy()])[0][1]


def test_all_three_kinds_equal_the_harness_own_model_that_is_given_room(model, folder, tmp_path):
    exporting.export(exporting.read_export_source(folder), tmp_path / "exported")
    other = HFLM(str(tmp_path / "exported"), max_length=4096, device="cpu", batch_size=1)
    pairs = requests_of(*[pair for pair in PAIRS if pair[0]])
    found = model.loglikelihood(pairs, disable_tqdm=True)
    # One by one: of requests with the same joined text, the harness's model computes one and cuts the others out of it.
    expected = [other.loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    texts = requests_of(TEXT, TEXT[:50])
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (model, other))
    assert found == pytest.approx(expected, abs=1e-3)
    # transformers decodes the end-of-document token as a stop string; this model has none.
    other.tok_decode = lambda ids, **options: HFLM.tok_decode(other, ids, **options) if ids is not None else None
    contexts = requests_of(*[(context, GREEDY) for context, _ in PAIRS[1::3]])
    found, expected = (lm.generate_until(contexts, disable_tqdm=True) for lm in (model, other))
    assert found == expected
    assert len(set(found)) > 1


@pytest.mark.parametrize("batch_size", [1, 50])
def test_batches_change_nothing(model, folder, batch_size):
    other = MemformerLM(folder, device="cpu", batch_size=str(batch_size))
    pairs = requests_of(*PAIRS[::3], ("The", " end"), ("The", " beginning"))
    found, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (other, model))
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-9)
    contexts = requests_of(*[(context, GREEDY) for context, _ in PAIRS[1::3] * 2])
    assert other.generate_until(contexts, disable_tqdm=True) == model.generate_until(contexts, disable_tqdm=True)


def test_a_shared_context_is_read_once(model, monkeypatch):
    reads = []
    monkeypatch.setattr(Session, "feed", lambda session, ids: reads.append(ids) or feed(session, ids))
    pairs = requests_of(*[(TEXT, f" {answer}") for answer in ("yes", "no", "perhaps", "never", "always")])
    model.loglikelihood(pairs, disable_tqdm=True)
    assert [[len(row) for row in ids] for ids in reads] == [[len(TEXT.encode())]]


feed = Session.feed


@pytest.mark.parametrize("length", [10, 300])
def test_only_a_piece_is_held_at_once(model, monkeypatch, length):
    text = (TEXT * 20)[:length]
    whole = [model.loglikelihood_rolling(requests_of(text), disable_tqdm=True)[0]]
    whole += [nats for nats, _ in model.loglikelihood(requests_of(("", text)), disable_tqdm=True)]
    monkeypatch.setattr(scoring, "_PIECE_TOKENS", 60)
    monkeypatch.setattr(scoring, "_PIECE_LOGITS", 60 * 256)
    sizes, states = [], []

    def watched(method):
        def call(session, ids):
            result = method(session, ids)
            sizes.append(len(result))
            states.append(session.state_bytes)
            return result

        return call

    for name in ("score", "token_logits"):
        monkeypatch.setattr(Session, name, watched(getattr(Session, name)))
    again = [model.loglikelihood_rolling(requests_of(text), disable_tqdm=True)[0]]
    again += [nats for nats, _ in model.loglikelihood(requests_of(("", text)), disable_tqdm=True)]
    assert again == pytest.approx(whole, abs=1e-8)
    assert max(sizes) <= 48  # whole segments
    assert sum(sizes) == 2 * len(text.encode())
    assert set(states) == {model.run.session().state_bytes}


def test_results_go_into_the_cache_of_the_harness(folder):
    model = MemformerLM(folder, device="cpu")
    kept = []
    model.cache_hook.add_partial = lambda *call: kept.append(call)
    requests = requests_of(("a", "b"), ("longer", "c"))
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert kept == [("loglikelihood", requests[index].args, found[index]) for index in (1, 0)]


def test_a_lone_surrogate_in_a_request_is_refused(model):
    message = "a request holds a lone surrogate at character 3; it is not valid text"
    with pytest.raises(InputError, match=message):
        model.loglikelihood_rolling(requests_of("abc\ud800"))


@pytest.mark.parametrize("disable", [True, False])
def test_progress_can_be_switched_off(model, capsys, disable):
    model.loglikelihood_rolling(requests_of("ab"), disable_tqdm=disable)
    assert ("Running loglikelihood_rolling requests" in capsys.readouterr().err) is not disable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, r"batch_size \('auto'\) must be a positive integer"),
        ({"batch_size": 0}, r"batch_size \(0\) must be"),
        ({"checkpoint": "first"}, r"checkpoint \('first'\) must be one of best, last"),
        ({"device": "tpu"}, r"device \('tpu'\) must be"),
        ({"pretrained": "nowhere"}, "nowhere is not a folder"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"dtype": "bfloat16"}, "unknown key 'dtype' in the model memformer"),
    ],
)
def test_bad_arguments_are_refused(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        MemformerLM(**{"pretrained": folder, "device": "cpu", **arguments})


@pytest.mark.parametrize(("kind", "context", "continuation"), [("bpe", "the ca", "t"), ("word", "the cat", "sat")])
def test_a_token_of_both_parts_is_not_lost(kind, context, continuation, tmp_path):
    text = b"the cat sat " * 5
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=260), [Document("text", text)])
    tiny_model(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    model = MemformerLM(str(tmp_path), device="cpu")
    ids, after = (tokenizer.encode(part.encode(), "text") for part in (context, continuation))
    joined = tokenizer.encode((context + continuation).encode(), "text")
    assert joined[: len(ids)].tolist() != ids.tolist()
    assert len(joined) <= len(ids)  # so what follows as many tokens as the context has would be nothing
    session = Session(model.run.model)
    session.feed(ids.tolist())
    ((nats, _),) = model.loglikelihood(requests_of((context, continuation)), disable_tqdm=True)
    expected = session.score(after.tolist())
    assert nats == pytest.approx(-float(expected.sum()), abs=1e-8)
    assert nats < 0


def test_a_continuation_without_tokens_is_refused(tmp_path):
    tokenizer = word_tokenizer(["the", "cat"])
    tiny_model(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(InputError, match="the tokenizer has no tokens for the continuation ' ' of a request"):
        MemformerLM(str(tmp_path), device="cpu").loglikelihood(requests_of(("the cat", " ")), disable_tqdm=True)
