import dataclasses
import errno
import gzip
import json
import os
import shutil
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import (
    ByteTokenizer,
    Corpus,
    Document,
    PixelTokenizer,
    SourceConfig,
    TokenizerConfig,
    build_corpus,
    building,
    corpus_from_arrays,
    train_tokenizer,
)
from memformer.data.documents import DocumentBlocks
from memformer.errors import CheckpointError, InputError, InputTypeError, SaveError

TEXTS = ["hello world", "", "a", "ünïcode text\nof two lines", "x" * 40]


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return SourceConfig(kind="jsonl", path=str(path))


def documents_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(index).tolist() for index in range(corpus.num_documents)]


def test_bytes_on_disk_without_empty_documents(tmp_path: Path, source: SourceConfig) -> None:
    reported: list[int] = []
    corpus = build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache", progress=reported.append)
    contents = [text.encode() for text in TEXTS if text]
    assert [bytes(document) for document in documents_of(corpus)] == contents
    assert corpus.document_lengths.tolist() == corpus.document_bytes.tolist() == [len(text) for text in contents]
    assert corpus.num_tokens == corpus.num_bytes == sum(map(len, contents)) == reported[-1]
    assert (corpus.num_documents, corpus.vocab_size, len(reported)) == (4, 256, 4)
    assert corpus.document(0).dtype == np.uint8
    assert not corpus.document(0).flags.writeable
    with pytest.raises(InputError, match=r"document index \(4\) must be from 0 to 3"):
        corpus.document(4)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "word"])
@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_cutting_loses_no_token_and_no_byte(tmp_path: Path, source: SourceConfig, kind: str, limit: int) -> None:
    size = {"bytes": None, "bpe": 270, "word": None}[kind]
    texts = [Document(str(index), text.encode()) for index, text in enumerate(TEXTS)]
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=size), texts)
    whole = build_corpus(source, tokenizer, cache=tmp_path)
    cut = build_corpus(source, tokenizer, cache=tmp_path, max_document_tokens=limit)
    assert list(chain(*documents_of(cut))) == list(chain(*documents_of(whole)))
    assert cut.document_lengths.max() == min(limit, whole.document_lengths.max())
    assert cut.num_bytes == whole.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert cut.num_documents == sum(-(-int(length) // limit) for length in whole.document_lengths)
    if kind == "bytes":
        assert np.array_equal(cut.document_bytes, cut.document_lengths)


def test_images(tmp_path: Path) -> None:
    corpus = build_corpus(SourceConfig(kind="digits", documents=":3"), PixelTokenizer(17, 8, 8), cache=tmp_path)
    assert (corpus.num_documents, corpus.num_tokens, corpus.num_bytes) == (3, 192, 192)


def test_second_build_uses_the_cache(tmp_path: Path, source: SourceConfig, monkeypatch) -> None:
    first = build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    monkeypatch.setattr(building, "iterate_blocks", None)
    assert documents_of(build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")) == documents_of(first)


def test_key_covers_everything_that_matters(tmp_path: Path, source: SourceConfig) -> None:
    cache = tmp_path / "cache"

    def num_corpora() -> int:
        return len(list(cache.iterdir()))

    build_corpus(source, ByteTokenizer(), cache=cache)
    build_corpus(source, train_tokenizer(TokenizerConfig(kind="word"), [Document("x", b"a b")]), cache=cache)
    assert num_corpora() == 2
    build_corpus(source, ByteTokenizer(), cache=cache, max_document_tokens=5)
    assert num_corpora() == 3
    os.utime(source.path, ns=(1, 1))
    build_corpus(source, ByteTokenizer(), cache=cache)
    assert num_corpora() == 4
    build_corpus(SourceConfig(kind="jsonl", path=source.path, documents=":3"), ByteTokenizer(), cache=cache)
    assert num_corpora() == 5


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stand-ins for the packages of the hub: folders of text files, and the commit of each data set of the hub."""
    commits: dict[str, str] = {}

    def load_dataset(name: str, *_: object, revision: str | None, **__: object) -> list[dict[str, str]]:
        folder = Path(name)
        texts = [file.read_text() for file in folder.iterdir()] if folder.is_dir() else [f"commit {revision}"]
        return [{"text": text} for text in texts]

    hub, datasets = ModuleType("huggingface_hub"), ModuleType("datasets")
    hub.HfApi = lambda: SimpleNamespace(dataset_info=lambda name, **_: SimpleNamespace(sha=commits[name]))
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return commits


def texts_of(source: SourceConfig, cache: Path) -> list[bytes]:
    return [bytes(ids) for ids in documents_of(build_corpus(source, ByteTokenizer(), cache=cache))]


def test_a_local_data_set_is_known_by_its_files(tmp_path: Path, data_sets, monkeypatch) -> None:
    """Two local data sets of the same relative name are not mixed up, and a rewritten file is read anew."""
    source = SourceConfig(kind="huggingface", name="./data", split="train")
    for project in ("one", "two"):
        (tmp_path / project / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / project)
        Path("data", "train.txt").write_text(project)
        assert texts_of(source, tmp_path / "cache") == [project.encode()]
    Path("data", "train.txt").write_text("new")
    assert texts_of(source, tmp_path / "cache") == [b"new"]
    with pytest.raises(InputError, match=r"revision \('0{40}'\) is not read for ./data, which is a local folder"):
        texts_of(dataclasses.replace(source, revision="0" * 40), tmp_path / "cache")


def test_a_data_set_of_the_hub_is_known_by_its_commit(tmp_path: Path, data_sets) -> None:
    """A new version of a data set on the hub is noticed; a given commit is read without asking the hub."""
    source = SourceConfig(kind="huggingface", name="some/data", split="train")
    for commit in ("a" * 40, "b" * 40):
        data_sets["some/data"] = commit
        assert texts_of(source, tmp_path / "cache") == [f"commit {commit}".encode()]
    data_sets.clear()
    pinned = dataclasses.replace(source, revision="a" * 40)
    assert texts_of(pinned, tmp_path / "cache") == [f"commit {'a' * 40}".encode()]
    with pytest.raises(InputError, match="the newest version of data set 'some/data' cannot be looked up on the hub"):
        texts_of(source, tmp_path / "cache")


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, source: SourceConfig) -> None:
    """A file that is rewritten with as many bytes and the old modification time is read anew."""
    path = Path(source.path)
    before = path.stat()
    build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    path.write_text(path.read_text(encoding="utf-8").replace("hello", "jelly"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert texts_of(source, tmp_path / "cache")[0] == b"jelly world"


def test_fingerprints_are_equal_for_equal_documents_only(tmp_path: Path, source: SourceConfig) -> None:
    """The fingerprint of a corpus covers its tokens and its documents, on disk and in memory."""
    on_disk = build_corpus(source, ByteTokenizer(), cache=tmp_path)
    documents = [np.array(document) for document in documents_of(on_disk)]
    assert on_disk.fingerprint == corpus_from_arrays(documents, 256).fingerprint
    changed = [documents[0] + 1, *documents[1:]]
    joined = [np.concatenate(documents[:2]), *documents[2:]]
    others = [corpus_from_arrays(other, 256) for other in (changed, joined)] + [on_disk.subset([1, 0, 2, 3])]
    assert len({on_disk.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_failure_midway_leaves_nothing(tmp_path: Path, source: SourceConfig, monkeypatch) -> None:
    def failing(_: SourceConfig):
        yield DocumentBlocks("one", iter([b"fine"]))
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(building, "iterate_blocks", failing)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(source, ByteTokenizer(), cache=cache)
    assert list(cache.iterdir()) == []
    assert build_corpus(source, ByteTokenizer(), cache=cache).num_documents == 4


def test_the_second_of_two_builders_uses_the_corpus_of_the_first(
    tmp_path: Path, source: SourceConfig, monkeypatch
) -> None:
    cache = tmp_path / "cache"
    raced = []

    def other_process_is_faster(num_tokens: int) -> None:
        if not raced:
            raced.append(build_corpus(source, ByteTokenizer(), cache=cache))

    corpus = build_corpus(source, ByteTokenizer(), cache=cache, progress=other_process_is_faster)
    assert documents_of(corpus) == documents_of(raced[0])
    assert len(list(cache.iterdir())) == 1


def test_full_disk_is_a_save_error(tmp_path: Path, source: SourceConfig, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"tokens\.bin could not be written: No space left on device"):
        build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file could not be written"):
        build_corpus(source, ByteTokenizer(), cache=tmp_path / "file")


def test_sources_own_os_error_is_not_a_save_error(tmp_path: Path, source: SourceConfig, monkeypatch) -> None:
    def failing(_: SourceConfig):
        yield DocumentBlocks("one", iter([b"fine"]))
        raise ConnectionError("network is gone")

    monkeypatch.setattr(building, "iterate_blocks", failing)
    with pytest.raises(ConnectionError):
        build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["corpus.json", "tokens.bin", "documents.bin"])
def test_every_flipped_byte_is_refused(tmp_path: Path, source: SourceConfig, name: str) -> None:
    cache = tmp_path / "cache"
    build_corpus(source, ByteTokenizer(), cache=cache)
    (folder,) = cache.iterdir()
    good = (folder / name).read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Corpus.open(folder)
    for damaged in (good[:-1], good + b"\0", b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Corpus.open(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " cannot be read"):
        build_corpus(source, ByteTokenizer(), cache=cache)
    (folder / name).write_bytes(good)
    assert Corpus.open(folder).num_documents == 4


def test_other_format_version_is_refused(tmp_path: Path, source: SourceConfig) -> None:
    build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(CheckpointError, match=r"corpus\.json is not a corpus of format version 3"):
        Corpus.open(folder)


def test_corpus_stays_readable_when_its_folder_is_removed(tmp_path: Path, source: SourceConfig) -> None:
    corpus = build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    before = documents_of(corpus)
    shutil.rmtree(tmp_path / "cache")
    assert documents_of(corpus) == before


def test_wrong_documents_are_refused(tmp_path: Path, source: SourceConfig) -> None:
    class Liar(ByteTokenizer):
        vocab_size = 100

    class Floating(ByteTokenizer):
        def encode(self, content, name):
            return np.ones(3)

    with pytest.raises(InputError, match=r"document .*a\.jsonl:1: token id 1\d\d is outside the vocabulary"):
        build_corpus(source, Liar(), cache=tmp_path)
    with pytest.raises(InputTypeError, match=r"a\.jsonl:1: token ids have dtype float64; they must be integers"):
        build_corpus(source, Floating(), cache=tmp_path)
    with pytest.raises(InputError, match=r"max_document_tokens \(0\) must be at least 1"):
        build_corpus(source, ByteTokenizer(), cache=tmp_path, max_document_tokens=0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"empty\.jsonl holds no token: all its documents are empty"):
        build_corpus(SourceConfig(kind="jsonl", path=str(empty)), ByteTokenizer(), cache=tmp_path)
    truncated = tmp_path / "t.gz"
    truncated.write_bytes(gzip.compress(b"hello")[:-4])
    with pytest.raises(InputError, match=r"t\.gz cannot be read"):
        build_corpus(SourceConfig(path=str(truncated)), ByteTokenizer(), cache=tmp_path / "cache")


def test_in_memory() -> None:
    corpus = corpus_from_arrays([np.array([1, 2]), np.array([300], np.int32)], 301, [5, 6])
    assert documents_of(corpus) == [[1, 2], [300]]
    assert (corpus.num_tokens, corpus.num_bytes, corpus.vocab_size) == (3, 11, 301)
    assert corpus_from_arrays([np.array([1, 2])], 3).num_bytes == 2
    assert not corpus.document(0).flags.writeable
    unmasked = np.ma.array([1, 2], mask=[0, 0])
    assert documents_of(corpus_from_arrays(iter([torch.tensor([0, 1]), (2,), unmasked]), 3)) == [[0, 1], [2], [1, 2]]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ([], InputError, "at least one document"),
        ([np.array([1]), np.array([], np.int64)], InputError, "document 1 is empty"),
        ([np.array([[1]])], InputError, r"document 0: token ids have shape \(1, 1\)"),
        ([np.array([1.0])], InputTypeError, "document 0: token ids have dtype float64; they must be integers"),
        ([np.array([True])], InputTypeError, "document 0: token ids have dtype bool"),
        (
            [np.array([1]), np.array([3])],
            InputError,
            "document 1: token id 3 is outside the vocabulary",
        ),
        ([np.array([-1])], InputError, "document 0: token id -1 is outside the vocabulary"),
        ([[1], torch.ones(2, dtype=torch.bfloat16)], InputTypeError, "document 1: token ids have dtype bfloat16"),
        ([[[1], [1, 2]]], InputError, r"document 0: token ids .* must be one-dimensional"),
        ([b"abc"], InputTypeError, "document 0: token ids are a bytes"),
        ([np.ma.array([1, 2], mask=[0, 1])], InputError, "document 0: token ids are an array with masked items"),
        (5, InputTypeError, r"arrays \(5\) must hold the token ids of each document"),
        ("abc", InputTypeError, r"arrays \('abc'\) must hold"),
    ],
)
def test_wrong_arrays_are_refused(arrays, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corpus_from_arrays(arrays, 3)


@pytest.mark.parametrize("document_bytes", [[1, 2], [-1]])
def test_wrong_byte_counts_are_refused(document_bytes: list[int]) -> None:
    with pytest.raises(InputError, match="document_bytes"):
        corpus_from_arrays([np.array([1])], 3, document_bytes)


def numbered(num_documents: int) -> Corpus:
    return corpus_from_arrays([np.full(n + 1, n) for n in range(num_documents)], max(num_documents, 1))


def test_subset_is_a_consistent_view() -> None:
    corpus = numbered(5)
    part = corpus.subset([3, 1]).subset(np.array([1, 0]))
    assert documents_of(part) == [[1, 1], [3, 3, 3, 3]]
    assert (part.num_documents, part.num_tokens, part.num_bytes) == (2, 6, 6)
    assert np.shares_memory(part.document(0), corpus.document(1))
    with pytest.raises(InputError, match="needs at least one document"):
        corpus.subset([])
    for wrong in (-1, 5):
        with pytest.raises(InputError, match=rf"document index \({wrong}\) must be from 0 to 4"):
            corpus.subset([0, wrong])


@settings(max_examples=40)
@given(st.integers(2, 30), st.floats(0.001, 0.999), st.integers(0, 1000))
def test_split_partitions_all_documents(num_documents: int, fraction: float, seed: int) -> None:
    corpus = numbered(num_documents)
    train, held_out = corpus.split(fraction, seed)
    again = corpus.split(fraction, seed)
    assert [documents_of(part) for part in again] == [documents_of(train), documents_of(held_out)]
    assert sorted(documents_of(train) + documents_of(held_out)) == documents_of(corpus)
    assert held_out.num_documents == min(max(1, round(fraction * num_documents)), num_documents - 1)


def test_split_depends_on_the_seed_and_refuses_invalid_arguments() -> None:
    corpus = numbered(20)
    assert len({str(documents_of(corpus.split(0.3, seed)[1])) for seed in range(5)}) > 1
    with pytest.raises(InputError, match="has 1 document of 1 token; holding some out needs at least 2"):
        numbered(1).split(0.5, 0)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="fraction"):
            corpus.split(fraction, 0)
    with pytest.raises(InputError, match=r"seed \(-1\)"):
        corpus.split(0.5, -1)
