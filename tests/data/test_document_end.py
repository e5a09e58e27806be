"""The end-of-document token: every document ends with it, no text stands for it, and no byte is counted for it."""

import json

import numpy as np
import pytest

from memformer import CheckpointError, InputError, Session, evaluate
from memformer.data import (
    ByteTokenizer,
    DocumentEndTokenizer,
    PixelTokenizer,
    SourceConfig,
    build_corpus,
    document_end_of,
    load_tokenizer,
    save_tokenizer,
)
from tests.data.test_tokenizers import BPE, WORD
from tests.helpers import assert_close, tiny_model

TEXTS = ["the cat", "", "äöü\n\nthe mat\n", "x", "on and on and on"]
INNER = {"bytes": ByteTokenizer(), "bpe": BPE, "word": WORD}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return SourceConfig(kind="jsonl", path=str(tmp_path / "texts.jsonl"))


def documents_of(corpus):
    return [corpus.document(index).tolist() for index in range(corpus.num_documents)]


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("limit", [None, 1, 2, 7, 1000])
def test_every_document_ends_with_the_token_and_no_byte_is_counted_for_it(tmp_path, source, kind, limit):
    """Only the last piece of a document that is cut ends with it, so it is never a document by itself."""
    inner = INNER[kind]
    tokenizer = DocumentEndTokenizer(inner)
    end = document_end_of(tokenizer)
    assert (end, tokenizer.vocab_size, document_end_of(inner)) == (inner.vocab_size, inner.vocab_size + 1, None)
    without = build_corpus(source, inner, cache=tmp_path / "cache", max_document_tokens=limit)
    corpus = build_corpus(source, tokenizer, cache=tmp_path / "cache", max_document_tokens=limit)
    assert corpus.vocab_size == tokenizer.vocab_size
    expected, documents = documents_of(without), documents_of(corpus)
    assert [[token for token in document if token != end] for document in documents] == expected
    assert np.array_equal(corpus.document_bytes, without.document_bytes)
    pieces = iter(documents)
    for text in filter(None, TEXTS):
        whole: list[int] = []
        while end not in whole:
            whole += next(pieces)
        assert whole == [*inner.encode(text.encode(), "x").tolist(), end]
    assert next(pieces, None) is None
    # Another identity, so neither is read in place of the other.
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert corpus.fingerprint != without.fingerprint


@pytest.mark.parametrize("kind", INNER)
def test_no_text_stands_for_the_token(kind):
    tokenizer = DocumentEndTokenizer(INNER[kind])
    content = "the cat ä\nsat".encode()
    ids = tokenizer.encode(content, "x").tolist()
    ended = [*ids[:2], tokenizer.document_end, *ids[2:], tokenizer.document_end]
    assert tokenizer.decode(ended) == INNER[kind].decode(ids)
    assert "".join(tokenizer.decode_stream(ended)) == "".join(INNER[kind].decode_stream(ids))
    with pytest.raises(InputError, match="token id"):
        tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("kind", INNER)
def test_a_saved_tokenizer_keeps_the_token(tmp_path, kind):
    tokenizer = DocumentEndTokenizer(INNER[kind])
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert document_end_of(loaded) == tokenizer.document_end
    assert loaded.fingerprint == tokenizer.fingerprint != INNER[kind].fingerprint
    assert loaded.encode(b"the cat", "x").tolist() == tokenizer.encode(b"the cat", "x").tolist()
    config = tmp_path / "tokenizer_config.json"
    for changed in (False, "yes"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"end_of_document": changed}))
        with pytest.raises(CheckpointError, match="fingerprint"):
            load_tokenizer(tmp_path)


def test_tokenizers_that_cannot_have_the_token_are_refused():
    with pytest.raises(InputError, match="an end-of-document token is for texts; images"):
        DocumentEndTokenizer(PixelTokenizer(4, 2, 3))
    with pytest.raises(InputError, match="has an end-of-document token already"):
        DocumentEndTokenizer(DocumentEndTokenizer(ByteTokenizer()))


def test_an_evaluation_counts_the_token_but_only_bytes_of_text(tmp_path, source):
    tokenizer = DocumentEndTokenizer(ByteTokenizer())
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    corpus = build_corpus(source, tokenizer, cache=tmp_path)
    found = evaluate(model, corpus, num_lanes=2).with_memory
    texts = [text.encode() for text in TEXTS if text]
    scores = Session(model, batch_size=len(texts)).score([[*text, tokenizer.document_end] for text in texts])
    nll = sum(row.sum() for row in scores)
    assert_close(nll.new_tensor(found.nll), nll)
    num_bytes = sum(map(len, texts))
    assert (found.num_bytes, found.num_tokens) == (num_bytes, num_bytes + len(texts))
    assert_close(nll.new_tensor(found.bits_per_byte), nll / num_bytes / np.log(2))
