"""Corpora are built of files of any size in little memory; the blocks in which a file is read change nothing."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import (
    SourceConfig,
    TokenizerConfig,
    build_corpus,
    iterate_documents,
    streaming,
    train_tokenizer,
)
from memformer.data.document_end import DocumentEndTokenizer
from memformer.data.outside_tokenizers import PretrainedTokenizer
from memformer.data.sources import iterate_blocks
from memformer.training.config import DataConfig
from memformer.training.run_tokenizer import make_tokenizer
from tests.data.outside import byte_level

MEBIBYTE = 1 << 20
TEXTS = ["the cat sat\non the mat\n\n\n  and\nsat " * 9, "the \u00e9nd", "\n", "a\r\nline\n\nanother\n" * 12]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text.encode())
    return tmp_path / "texts"


def documents_of(corpus):
    return [corpus.document(index).tolist() for index in range(corpus.num_documents)]


def in_small_blocks(patches, size):
    """Let files be read in blocks of this many bytes."""
    read_blocks = streaming.read_blocks
    patches.setattr(
        "memformer.data.text.read_blocks",
        lambda stream, name: (
            block[start : start + size] for block in read_blocks(stream, name) for start in range(0, len(block), size)
        ),
    )


@pytest.mark.parametrize("kind", ["bytes", "bpe", "word", "pretrained"])
@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("with_end", [False, True])
def test_blocks_change_nothing(texts, tmp_path, kind, most, with_end, monkeypatch):
    source = SourceConfig(path=str(texts))
    if kind == "pretrained":
        tokenizer = PretrainedTokenizer(byte_level())
    else:
        vocabulary = {"vocab_size": 270} if kind in {"bpe", "word"} else {}
        tokenizer = train_tokenizer(TokenizerConfig(kind=kind, **vocabulary), iterate_documents(source))
    expected = [tokenizer.encode(text.encode(), "x") for text in TEXTS]
    tokenizer = DocumentEndTokenizer(tokenizer) if with_end else tokenizer
    whole = build_corpus(source, tokenizer, cache=tmp_path / "whole", max_document_tokens=most)
    in_small_blocks(monkeypatch, 7)
    parts = build_corpus(source, tokenizer, cache=tmp_path / "parts", max_document_tokens=most)
    assert parts.fingerprint == whole.fingerprint
    assert parts.document_bytes.tolist() == whole.document_bytes.tolist()
    assert parts.num_bytes == sum(len(text.encode()) for text in TEXTS)
    if most is None:
        end = [tokenizer.vocab_size - 1] if with_end else []
        assert documents_of(parts) == [[*ids.tolist(), *end] for ids in expected]


class Pairs:
    """A tokenizer of a user: pairs of bytes, which cross the ends of lines."""

    kind, vocab_size, fingerprint = "pairs", 1 << 16, "0" * 64

    def encode(self, content, name):
        return np.frombuffer(content, "<u2")

    def decode(self, ids):
        return np.array(ids, "<u2").tobytes()

    def decode_stream(self, ids):
        yield self.decode(list(ids)).decode()


def test_texts_of_other_tokenizers_are_not_cut(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"xy\n" * 3000)
    corpus = build_corpus(SourceConfig(path=str(tmp_path / "text.txt")), Pairs(), cache=tmp_path / "cache")
    assert Pairs().decode(corpus.document(0)) == b"xy\n" * 3000
    assert corpus.num_tokens == 4500


@settings(max_examples=30)
@given(size=st.integers(1, 40))
def test_documents_within_a_file_do_not_depend_on_blocks(tmp_path_factory, size):
    file = tmp_path_factory.mktemp("texts") / "articles.txt"
    file.write_bytes(b" = One = \nfirst\n\nmore\n = Two = \r\nsecond\n = Three = ")
    source = SourceConfig(path=str(file), document_start=" = .* = ")
    expected = list(iterate_documents(source))
    assert [document.name for document in expected] == [f"{file}:{line}" for line in (1, 5, 7)]
    with pytest.MonkeyPatch.context() as patches:
        in_small_blocks(patches, size)
        assert list(iterate_documents(source)) == expected


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_the_same_tokenizer_is_learned_of_blocks(texts, kind, monkeypatch):
    source = SourceConfig(path=str(texts))
    config = TokenizerConfig(kind=kind, vocab_size=270)
    expected = train_tokenizer(config, iterate_documents(source)).fingerprint
    in_small_blocks(monkeypatch, 5)
    data = DataConfig(train=source, tokenizer=config)
    assert make_tokenizer(data, shows_progress=False).fingerprint == expected


def test_other_documents_are_blocks_too(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": ""}\n{"text": "abc"}\n')
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "texts.jsonl"))
    assert [list(blocks) for _, blocks in iterate_blocks(source)] == [[b""], [b"abc"]]
    np.save(tmp_path / "series.npy", np.arange(6.0).reshape(3, 2))
    ((_, blocks),) = iterate_blocks(SourceConfig(kind="array", path=str(tmp_path / "series.npy")))
    assert [block.shape for block in blocks] == [(3, 2)]
    # Long texts of other kinds are cut as well, so that progress is shown.
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a" * (2 * MEBIBYTE + 1) + '"}\n')
    ((_, blocks),) = iterate_blocks(SourceConfig(kind="jsonl", path=str(tmp_path / "long.jsonl")))
    assert [len(block) for block in blocks] == [MEBIBYTE, MEBIBYTE, 1]


@pytest.mark.parametrize("kind", ["bytes", "word"])
def test_a_large_file_needs_little_memory(tmp_path, kind):
    """A log of some gigabytes is prepared on a machine with less memory than that."""
    file = tmp_path / "log.txt"
    file.write_bytes(b"INFO one line of a long log\n" * (24 * MEBIBYTE // 28))
    source, config = SourceConfig(path=str(file)), TokenizerConfig(kind=kind)
    tracemalloc.start()
    try:
        tokenizer = DocumentEndTokenizer(
            make_tokenizer(DataConfig(train=source, tokenizer=config), shows_progress=False)
        )
        corpus = build_corpus(source, tokenizer, cache=tmp_path / "cache", max_document_tokens=1024)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert corpus.num_bytes == file.stat().st_size
    assert peak < 12 * MEBIBYTE
