import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from memformer.data import Document, SourceConfig, iterate_documents
from memformer.data.documents import parse_slice, slice_documents
from memformer.data.sources import source_bytes
from memformer.data.tokenizer_training import TokenizerConfig, train_tokenizer
from memformer.errors import InputError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def contents(source: SourceConfig) -> list[bytes]:
    return [bytes(document.content) for document in iterate_documents(source)]


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.txt").write_bytes(b"bee")
    (root / "a.txt").write_bytes(b"ay")
    (root / "empty.txt").write_bytes(b"")
    (root / ".secret").write_bytes(b"no")
    (root / ".hidden" / "x.txt").write_bytes(b"no")
    (root / "sub" / "c.md").write_bytes("séa".encode())
    return root


def test_folder_is_read_recursively_in_order_without_hidden_and_empty_files(folder: Path) -> None:
    documents = list(iterate_documents(SourceConfig(path=str(folder))))
    assert documents[0] == Document(str(folder / "a.txt"), b"ay")
    assert [document.content for document in documents] == [b"ay", b"bee", "séa".encode()]


def test_glob_and_list_keep_their_order(folder: Path) -> None:
    assert contents(SourceConfig(path=str(folder / "*.txt"))) == [b"ay", b"bee"]
    assert contents(SourceConfig(path=str(folder / "**" / "*.md"))) == ["séa".encode()]
    assert contents(SourceConfig(path=[str(folder / "sub"), str(folder / "a.txt")])) == ["séa".encode(), b"ay"]


def test_existing_file_is_not_treated_as_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"one")
    assert contents(SourceConfig(path=str(tmp_path / "a[1].txt"))) == [b"one"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_text_and_json_lines(tmp_path: Path, suffix: str, compress) -> None:
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(compress(b"hello"))
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    assert contents(SourceConfig(path=str(text))) == [b"hello"]
    documents = list(iterate_documents(SourceConfig(kind="jsonl", path=str(lines))))
    assert documents == [(f"{lines}:1", b"one"), (f"{lines}:3", b"two")]


def test_missing_and_empty_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path \(.*nowhere\) does not exist"):
        iterate_documents(SourceConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match=r"path \(''\) is empty; it would mean the current folder"):
        iterate_documents(SourceConfig(path=["", str(tmp_path)]))
    with pytest.raises(InputError, match="matches no file"):
        iterate_documents(SourceConfig(path=str(tmp_path / "*.txt")))
    with pytest.raises(InputError, match="is a folder without any file"):
        iterate_documents(SourceConfig(path=str(tmp_path)))
    empty = tmp_path / "empty.txt"
    empty.touch()
    for kind in ("text", "jsonl"):
        with pytest.raises(InputError, match=r"empty\.txt is empty"):
            contents(SourceConfig(kind=kind, path=str(empty)))
    with pytest.raises(InputError, match="is a folder without any file"):
        iterate_documents(SourceConfig(path=str(tmp_path)))


def test_empty_compressed_files_in_a_folder_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(InputError, match="holds no document"):
        contents(SourceConfig(path=str(tmp_path)))
    with pytest.raises(InputError, match=r"a\.gz is empty"):
        contents(SourceConfig(path=str(tmp_path / "a.gz")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"a\.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 text at byte offset 27 \(0xff\)"),
        (b"[" * 100_000, r"a\.jsonl:2 is not JSON"),
        (b"[1]", r"a\.jsonl:2 is a JSON list; every line must be an object"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:2 has no key text_key \('text'\); its keys are: body, id"),
        (b"{}", r"its keys are: none"),
        (b'{"text": 3}', r"a\.jsonl:2 holds an int under 'text'; it must be a string"),
        (b'{"text": "ab\\ud800"}', r"a\.jsonl:2 holds a lone surrogate at character 2"),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        contents(SourceConfig(kind="jsonl", path=str(path)))


def test_json_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "one"}\nbroken\n')
    documents = iterate_documents(SourceConfig(kind="jsonl", path=str(path), text_key="body"))
    assert next(documents).content == b"one"


@pytest.mark.parametrize("text", [":", "2:", ":3", "1:4", "-3:", ":-2", "-5:-2", "2:-3", "-4:9", " 1 : 2 ", "-99:"])
def test_slices_equal_list_slices(text: str) -> None:
    documents = [Document(str(index), b"") for index in range(7)]
    start, stop = parse_slice(text)
    assert list(slice_documents(iter(documents), start=start, stop=stop)) == documents[start:stop]


def test_slice_of_a_source(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": str(index)} for index in range(5)))
    assert contents(SourceConfig(kind="jsonl", path=str(path), documents="-2:")) == [b"3", b"4"]
    with pytest.raises(InputError, match=r"a\.jsonl \[9:\] holds no document"):
        contents(SourceConfig(kind="jsonl", path=str(path), documents="9:"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"path \(None\) must be given for kind 'text'"),
        ({"kind": "idx", "path": []}, r"path \(\[\]\) must be given for kind 'idx'"),
        ({"kind": "huggingface", "split": "train"}, r"name \(None\) must be given"),
        ({"kind": "huggingface", "name": "x"}, r"split \(None\) must be given"),
        ({"kind": "python", "path": "x"}, r"path \('x'\) is not read by kind 'python', only by text, jsonl, idx"),
        ({"path": "x", "text_key": "body"}, r"text_key \('body'\) is not read by kind 'text'"),
        ({"kind": "jsonl", "path": "x", "document_start": "#"}, r"document_start \('#'\) is not read by kind 'jsonl'"),
        ({"path": "x", "document_start": "("}, r"document_start \('\('\) is not a regular expression: missing \)"),
        ({"path": "x", "levels": 2}, r"levels \(2\) is not read by kind 'text'"),
        ({"kind": "digits", "downsample": 2}, r"downsample \(2\) is not read by kind 'digits'"),
        ({"path": "x", "name": "y"}, r"name \('y'\) is not read"),
        (
            {"kind": "huggingface", "name": "x", "split": "train", "revision": "main"},
            r"revision \('main'\) must be a commit, 40 hexadecimal digits",
        ),
        ({"kind": "idx", "path": "x", "levels": 1}, r"levels \(1\) must be from 2 to 256"),
        ({"kind": "idx", "path": "x", "levels": 257}, r"levels \(257\) must be"),
        ({"kind": "idx", "path": "x", "downsample": 0}, r"downsample \(0\) must be at least 1"),
        ({"path": "x", "documents": "5"}, r"documents \('5'\) must be 'start:stop'"),
        ({"path": "x", "documents": "1:2:3"}, "must be 'start:stop'"),
        ({"path": "x", "documents": "a:"}, "must be 'start:stop'"),
        ({"path": "x", "documents": f":{2**63}"}, r"must be 'start:stop' with integers \(18 digits at most\)"),
        ({"path": "x", "documents": f"-{2**63}:"}, "must be 'start:stop'"),
    ],
)
def test_contradictory_configurations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SourceConfig(**fields)


def test_unknown_kind_is_refused() -> None:
    # Avoids the type checker of the tests, which a user's program does not have.
    config = object.__new__(SourceConfig)
    object.__setattr__(config, "kind", "csv")
    with pytest.raises(InputError, match=r"kind \('csv'\) must be one of text, jsonl"):
        config.__post_init__()


def test_standard_library_is_sorted_and_without_tests() -> None:
    documents = list(iterate_documents(SourceConfig(kind="python")))
    every = [document.name for document in documents]
    assert every == sorted(every)
    assert {"argparse.py", "json/decoder.py"} <= set(every)
    assert all(document.content for document in documents)
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(Path(name).parts[:-1]) for name in every)


WIKITEXT = " \n = One = \n \n = = Part = = \n a\n \n = Two = \n b = c\n"
ARTICLES = [WIKITEXT[: WIKITEXT.index(" = Two")].encode(), WIKITEXT[WIKITEXT.index(" = Two") :].encode()]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (WIKITEXT, ARTICLES),
        (WIKITEXT.replace("\n", "\r\n"), [article.replace(b"\n", b"\r\n") for article in ARTICLES]),
        (WIKITEXT.rstrip("\n"), [ARTICLES[0], ARTICLES[1].rstrip(b"\n")]),
        ("before\n" + WIKITEXT, [b"before\n \n", ARTICLES[0].removeprefix(b" \n"), ARTICLES[1]]),
        (" = One = \n = Two = \n", [b" = One = \n", b" = Two = \n"]),
        (" \n\n", [b" \n\n"]),
        ("a = b = c\n", [b"a = b = c\n"]),
    ],
)
def test_a_text_is_cut_where_documents_start(tmp_path: Path, content: str, documents: list[bytes]) -> None:
    path = tmp_path / "wiki.txt"
    path.write_bytes(content.encode())
    source = SourceConfig(path=str(path), document_start=" = [^=].* = ")
    assert contents(source) == documents
    assert b"".join(documents) == content.encode()


def test_documents_of_a_text_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(WIKITEXT)
    source = SourceConfig(path=str(path), document_start=" = [^=].* = ")
    assert [document.name for document in iterate_documents(source)] == [f"{path}:1", f"{path}:7"]
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        contents(source)


@pytest.mark.data
def test_articles_of_wikitext_2_hold_all_of_its_tokens() -> None:
    path = REAL_DATA / "wikitext-2" / "valid.txt"
    if not path.exists():
        pytest.skip("WikiText-2 is not beside the checkout")
    source = SourceConfig(path=str(path), document_start=" = [^=].* = ")
    documents = list(iterate_documents(source))
    tokenizer = train_tokenizer(TokenizerConfig(kind="word"), documents)
    assert len(documents) == 60
    assert sum(len(tokenizer.encode(content, name)) for name, content in documents) == 217_646


def test_records_of_the_hub_are_lines_where_documents_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Like WikiText on the hub: one record per line, and blank lines have no line ending.
    records = [line if line.strip() else "" for line in WIKITEXT.splitlines(keepends=True)]
    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: [{"text": record} for record in records]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = SourceConfig(kind="huggingface", name="x", split="train", document_start=" = [^=].* = ")
    assert list(iterate_documents(source)) == [
        ("x:0", b"\n = One = \n\n = = Part = = \n a\n\n"),
        ("x:6", b" = Two = \n b = c\n"),
    ]


def test_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **keywords: object) -> list[dict[str, object]]:
        calls.append((args, keywords))
        if args[0] == "missing":
            raise FileNotFoundError("no such data set")
        return [{"body": "one"}, {"body": "two"}]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = SourceConfig(kind="huggingface", name="x/y", config_name="raw", split="train", text_key="body")
    assert list(iterate_documents(source)) == [("x/y:0", b"one"), ("x/y:1", b"two")]
    assert calls == [(("x/y", "raw"), {"split": "train", "revision": None, "streaming": True})]
    with pytest.raises(InputError, match="x/y:0 has no key text_key"):
        contents(SourceConfig(kind="huggingface", name="x/y", split="train"))
    with pytest.raises(InputError, match=r"data set 'missing' .* cannot be loaded: no such data set"):
        contents(SourceConfig(kind="huggingface", name="missing", split="train"))


class Saved(list):
    """Records as `datasets.load_from_disk` returns them."""

    def __init__(self, texts: list[str], split: str | None) -> None:
        super().__init__({"text": text} for text in texts)
        self.split = split


def test_folders_of_save_to_disk_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that `save_to_disk` wrote is read, of one split and of several."""
    saved = {
        tmp_path / "one" / "state.json": Saved(["a"], "train"),
        tmp_path / "unnamed" / "state.json": Saved(["b"], None),
        tmp_path / "two" / "dataset_dict.json": {"train": Saved(["c"], "train"), "test": Saved(["d"], "test")},
    }
    for file in saved:
        file.parent.mkdir()
        file.write_text("{}")
    module = ModuleType("datasets")
    module.load_from_disk = {str(file.parent): records for file, records in saved.items()}.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", module)

    def read(name: str, split: str, **fields: str) -> list[bytes]:
        return contents(SourceConfig(kind="huggingface", name=str(tmp_path / name), split=split, **fields))

    assert (read("one", "train"), read("unnamed", "train"), read("two", "test")) == ([b"a"], [b"b"], [b"d"])
    with pytest.raises(InputError, match=r"split \('test'\) must be one of train, the splits that .*one holds"):
        read("one", "test")
    with pytest.raises(InputError, match=r"split \('validaton'\) must be one of train"):  # not taken for any split
        read("unnamed", "validaton")
    with pytest.raises(InputError, match=r"split \('dev'\) must be one of train, test"):
        read("two", "dev")
    with pytest.raises(InputError, match=r"config_name \('raw'\) is not read from .*one, which save_to_disk wrote"):
        read("one", "train", config_name="raw")


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"memformer-lm\[datasets\]"):
        contents(SourceConfig(kind="huggingface", name="x", split="train"))
    with pytest.raises(InputError, match=r"memformer-lm\[digits\]"):
        contents(SourceConfig(kind="digits"))


def test_the_size_of_compressed_documents_is_unknown(tmp_path: Path) -> None:
    """The size of a source is that of its text; compressed files are known by what they hold."""
    (tmp_path / "a.txt").write_bytes(b"abc\n" * 100)
    assert source_bytes(SourceConfig(path=str(tmp_path))) == 400
    assert source_bytes(SourceConfig(path=str(tmp_path), documents="1:")) is None
    # Their progress is counted in values, and in the pixels that are left.
    assert source_bytes(SourceConfig(kind="array", path=str(tmp_path))) is None
    assert source_bytes(SourceConfig(kind="idx", path=str(tmp_path), downsample=2)) is None
    (tmp_path / "b").write_bytes(gzip.compress(b"abc\n" * 100))
    assert source_bytes(SourceConfig(path=str(tmp_path))) is None
    assert source_bytes(SourceConfig(kind="huggingface", name=str(tmp_path), split="train")) is None
    assert source_bytes(SourceConfig(kind="python")) > 0


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("第.章", "第一章\na\n第二章\n"),
        ("第[一二三]章", "第一章\na\n第二章\n"),
        (r"É\w+", "Étés\na\nÉtés\r\n"),
        ("(?i)été.*", "Été 1\na\nÉTÉ 2\n"),
    ],
)
def test_documents_start_at_lines_of_characters(tmp_path: Path, pattern: str, text: str) -> None:
    (tmp_path / "x.txt").write_bytes(text.encode())
    found = contents(SourceConfig(path=str(tmp_path / "x.txt"), document_start=pattern))
    assert len(found) == 2
    assert b"".join(found) == text.encode()


def test_a_failure_while_a_data_set_is_streamed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def records() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: records()
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents = iterate_documents(SourceConfig(kind="huggingface", name="x/y", split="train"))
    assert next(documents) == ("x/y:0", b"one")
    with pytest.raises(InputError, match=r"data set 'x/y' .* cannot be loaded: .*invalid start byte"):
        next(documents)
