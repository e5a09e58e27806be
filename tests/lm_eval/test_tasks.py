"""The documents of the task pack, and all of its tasks through the harness."""

import json
import math

import pytest

from memformer.data import Document, RecallConfig, TokenizerConfig, save_tokenizer, train_tokenizer
from memformer.data.recall.stream import task_text
from memformer.errors import InputError
from memformer.lm_eval import tasks
from memformer.lm_eval.command import PACK
from tests.lm_eval.models import requests_of, save

STORIES = """1 Mary went to the hall.
2 John went to the garden.
3 Where is Mary? \thall\t1
4 Mary took the rope.
5 Where is John? \tgarden\t2
"""
PLAIN = "The man walked on and said that it was late – and the day was cold. "
CHAPTER = "They saw a windmill. " + PLAIN * 8 + "At last they came to the "
# Its last word occurs shortly before, so it is too easy.
NEAR = PLAIN * 8 + "They saw a lighthouse. " + PLAIN + "At last they came to the lighthouse. "
BOOK = (NEAR + PLAIN * 40 + CHAPTER + "windmill. " + PLAIN * 40 + CHAPTER + "seaside. ") * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("datasets", reason="needs the extra eval")
    folder = tmp_path_factory.mktemp("data")
    for name, text in {
        "classics/test.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in (BOOK, PLAIN * 3)),
        "wikitext-2/test.txt": " = A title = \n A line .\n",
        "babi/en/qa1_single-supporting-fact_test.txt": STORIES,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _data_folder(request, monkeypatch):
    tasks._haystacks.clear()
    monkeypatch.setattr(tasks, "_RARE", 1 / 300)  # the test's book is short
    monkeypatch.delenv(tasks.DATA_VARIABLE, raising=False)
    if "data" in request.fixturenames:
        monkeypatch.setenv(tasks.DATA_VARIABLE, str(request.getfixturevalue("data")))


@pytest.mark.parametrize("num_tokens", [1024, 4097])
def test_episodes_have_their_size_the_facts_first_and_the_question_last(data, num_tokens):
    sizes = {"num_tokens": num_tokens, "num_docs": 5, "tokenizer": "bytes"}
    for docs in (tasks.passkey(**sizes)["test"], tasks.babi(**sizes)["test"]):
        assert len(docs) == 5
        assert all(len(doc["context"].encode()) == num_tokens for doc in docs)
    for doc in tasks.passkey(**sizes)["test"]:
        fact = f" The pass key is {doc['answer']}. Remember it."
        assert 0 <= doc["context"].find(fact) <= 128 - len(fact)
        assert doc["context"].endswith(" What is the pass key? The pass key is")
        assert doc["context"].count(doc["answer"]) == 1
    for doc in tasks.babi(**sizes)["test"]:
        # The question after most statements is the last one.
        assert doc["context"].endswith(" Where is John?")
        assert doc["answer"] == "garden"
        places = [doc["context"].find(f" {fact}") for fact in ("Mary went to the hall.", "John went to the garden.")]
        assert 0 <= places[0] < 64 <= places[1] < 128 < num_tokens
        assert doc["context"].find(" Mary took the rope.", 128) >= 128


def test_documents_depend_on_the_size_and_on_nothing_else(data):
    sizes = {"num_tokens": 1024, "num_docs": 3, "tokenizer": "bytes"}
    first = list(tasks.passkey(**sizes)["test"])
    tasks._haystacks.clear()
    assert list(tasks.passkey(**sizes, version=1.0, batch_size=7)["test"]) == first
    assert tasks.passkey(**{**sizes, "num_tokens": 1025})["test"][0]["answer"] != first[0]["answer"]
    assert len({doc["answer"] for doc in first}) == 3


def test_the_tokens_of_the_model_are_counted(data, tmp_path):
    config = TokenizerConfig(kind="word", vocab_size=60)
    document = Document("book", BOOK.encode())
    text = task_text(RecallConfig(task="passkey"), "word")
    tokenizer = train_tokenizer(config, [document], text=text)
    save_tokenizer(tokenizer, tmp_path)
    for doc in tasks.passkey(num_tokens=200, num_docs=3, pretrained=str(tmp_path))["test"]:
        assert len(tokenizer.encode(doc["context"].encode(), "context")) == 200
        assert len(doc["answer"].split()) == 5
        assert f"The pass key is {doc['answer']} . Remember it ." in doc["context"]
    save_tokenizer(train_tokenizer(config, [document]), tmp_path / "without")
    with pytest.raises(InputError, match="contains the word"):
        tasks.passkey(num_tokens=200, num_docs=1, pretrained=str(tmp_path / "without"))


def test_the_last_word_is_rare_and_is_found_only_far_before_it(data):
    docs = list(tasks.last_words(num_docs=10)["test"])
    assert [doc["answer"] for doc in docs] == ["windmill"] * 3
    for doc in docs:
        assert doc["context"].endswith("came to the")
        assert 0 <= doc["context"].rfind("windmill") < len(doc["context"]) - 200
        assert f"{doc['context']} {doc['answer']}." in BOOK
        assert len(doc["context"]) <= 2000
        assert doc["context"][0].isupper()
    assert len(tasks.last_words(num_docs=2)["test"]) == 2


def test_texts_are_whole(data):
    assert list(tasks.books()["test"]["text"]) == [BOOK, PLAIN * 3]
    assert list(tasks.wikitext()["test"]["text"]) == [" = A title = \n A line .\n"]
    other = data / "mine.txt"
    other.write_text("my text")
    assert list(tasks.books(books=str(other))["test"]["text"]) == ["my text"]


def test_every_task_runs_in_the_harness(data, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from memformer.lm_eval import MemformerLM

    folder = save(tmp_path / "model", segment_length=256)
    metadata = {"pretrained": folder, "num_docs": 2}
    manager = TaskManager(include_path=[str(PACK)], include_defaults=False, metadata=metadata)
    sizes = ("4k", "16k", "64k", "256k", "1m")
    names = {"memformer_wikitext", "memformer_books", "memformer_last_word"}
    recall = {f"memformer_{kind}_{size}" for kind in ("passkey", "babi") for size in sizes}
    assert set(manager.all_subtasks) == names | recall
    assert set(manager.all_groups) == {"memformer_passkey", "memformer_babi"}
    chosen = ["memformer_wikitext", "memformer_last_word", "memformer_babi_4k", "memformer_passkey_4k"]
    model = MemformerLM(folder, device="cpu", batch_size=4)
    results = simple_evaluate(model, tasks=chosen, task_manager=manager, limit=1, bootstrap_iters=0)["results"]
    assert set(results) == set(chosen)
    (nats,) = model.loglikelihood_rolling(requests_of(" = A title = \n A line .\n"), disable_tqdm=True)
    bits = -nats / 24 / 0.6931471805599453
    assert results["memformer_wikitext"]["bits_per_byte,none"] == pytest.approx(bits)
    last_word, passkey = tasks.last_words(**metadata), tasks.passkey(num_tokens=4096, **metadata)
    for name, docs in (("memformer_last_word", last_word), ("memformer_passkey_4k", passkey)):
        doc = docs["test"][0]
        ((nats, is_greedy),) = model.loglikelihood(requests_of((doc["context"], f" {doc['answer']}")))
        assert results[name]["perplexity,none"] == pytest.approx(math.exp(-nats), rel=1e-4)
        assert results[name]["acc,none"] == is_greedy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.books(), "needs data: give --data FOLDER"),
        (lambda: tasks.books(books="nowhere"), r"path \(nowhere\) does not exist"),
        (lambda: tasks.passkey(num_tokens=9, num_docs=1), "give pretrained in --model_args"),
    ],
)
def test_missing_data_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_sizes_that_are_too_small_are_refused(data):
    for changes, message in (
        ({"num_tokens": 150}, r"num_tokens \(150\) must be at least"),
        ({"num_docs": 0}, r"num_docs \(0\)"),
    ):
        with pytest.raises(InputError, match=message):
            tasks.passkey(**{"num_tokens": 999, "num_docs": 1, "tokenizer": "bytes", **changes})
