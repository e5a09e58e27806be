import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memformer.data import (
    ByteTokenizer,
    SourceConfig,
    TokenizerConfig,
    build_corpus,
    iterate_documents,
    train_tokenizer,
)
from memformer.data import content as content_module
from memformer.data.content import open_text
from memformer.data.recall.text_tasks import read_stories
from memformer.errors import InputError

TEXT = "the cat sat\nÄpfel über 猫\n"
IMAGES = struct.pack(">4I", 0x803, 2, 2, 3) + bytes(range(12))
# One frame of the format of zstd, which holds "hello" uncompressed.
ZSTD = b"\x28\xb5\x2f\xfd\x20\x05\x29\x00\x00hello"

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def read(path: Path, **fields: object) -> list[bytes]:
    return [bytes(document.content) for document in iterate_documents(SourceConfig(path=str(path), **fields))]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.GZ", "a.txt", "a.xz"])
def test_compressed_content_is_decompressed(tmp_path: Path, compression: str, name: str) -> None:
    """Compressed text, JSON lines, images and stories are decompressed, whatever their files are called."""
    compress, path = COMPRESSIONS[compression], tmp_path / name
    path.write_bytes(compress(TEXT.encode()))
    assert read(path) == [TEXT.encode()]
    assert read(path, document_start="Ä.*") == [line.encode() for line in TEXT.splitlines(keepends=True)]
    path.write_bytes(gzip.compress(compress(b'{"text": "one"}\n{"text": "two"}\n')))
    assert read(path, kind="jsonl") == [b"one", b"two"]
    path.write_bytes(compress(IMAGES))
    assert read(path, kind="idx") == [bytes(range(6)), bytes(range(6, 12))]
    path.write_bytes(compress(b"1 Mary left.\n2 Who left?\tMary\t1\n"))
    assert read_stories(str(path))[0].statements == ["Mary left."]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_name_does_not_make_a_text_compressed(tmp_path: Path, compression: str) -> None:
    """A text that is called a.gz and is not compressed is read; a truncated one is refused."""
    path = tmp_path / "a.gz"
    path.write_bytes(b"BZh, said the cat")
    assert read(path) == [b"BZh, said the cat"]
    path.write_bytes(COMPRESSIONS[compression](TEXT.encode())[:-6])
    with pytest.raises(InputError, match=r"a\.gz cannot be read"):
        read(path)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_streams_may_follow_one_another(tmp_path: Path, compression: str) -> None:
    """All streams of a file are read, with zeros behind them; what is no stream is refused instead of left out."""
    compress, path = COMPRESSIONS[compression], tmp_path / "a"
    parts = [f"part {number}\n".encode() * 9000 for number in range(3)]
    streams = [compress(part) for part in parts]
    path.write_bytes(b"".join(streams))
    assert read(path) == [b"".join(parts)]
    path.write_bytes(streams[0] + bytes(70_000) + streams[1] + bytes(8))
    assert read(path) == [parts[0] + parts[1]]
    for damaged in (b"\x01" + streams[1][1:], streams[1][:-5], b"something else"):
        path.write_bytes(streams[0] + damaged)
        with pytest.raises(InputError, match="a cannot be read: "):
            read(path)


def test_zstd_is_decompressed_or_refused_by_name(tmp_path: Path) -> None:
    """Content compressed with zstd is decompressed where Python can, and refused by name elsewhere."""
    path = tmp_path / "a.txt"
    path.write_bytes(ZSTD)
    if content_module._zstd is None:
        with pytest.raises(InputError, match=r"a\.txt is compressed with zstd, which Python reads from version 3\.14"):
            read(path)
    else:
        assert read(path) == [b"hello"]


def archive() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("a.txt", "hello")
        return file.getvalue()


def tar_archive() -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as opened:
            opened.addfile(tarfile.TarInfo("a.txt"))
        return file.getvalue()


def array() -> bytes:
    with io.BytesIO() as file:
        np.save(file, np.arange(3))
        return file.getvalue()


NOT_TEXT = {
    "latin": (
        TEXT[:16].replace("\n", " ").encode("latin-1"),
        r"at byte offset 12 \(0xc4\): it is binary or in another encoding",
    ),
    "parquet": (b"PAR1\x15\x04\x15\x10\x00\xffPAR1", "it is a parquet file"),
    "zip": (archive(), "it is a zip archive"),
    "tar": (tar_archive(), "it is a tar archive"),
    "array": (array(), r"at byte offset 0 \(0x93\): it is a NumPy array"),
    "utf-16": (TEXT.encode("utf-16"), r"at byte offset 0 \(0xff\): it is UTF-16 text"),
    "utf-16-le": ("the cat".encode("utf-16-le"), r"at byte offset 1 \(0x00\): it is binary or in another encoding"),
    "utf-32": ("the cat".encode("utf-32"), "it is UTF-32 text"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_content_that_is_not_text_is_refused(tmp_path: Path, case: str) -> None:
    """Binary and wrongly encoded files are refused by name in every kind of text, with bytes as tokens too."""
    content, message = NOT_TEXT[case]
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    message = rf"a\.txt is not UTF-8 text .*{message}"
    for fields in ({}, {"document_start": "x"}, {"kind": "jsonl"}):
        with pytest.raises(InputError, match=message):
            read(path, **fields)
    with pytest.raises(InputError, match=message):
        read_stories(str(path))
    source = SourceConfig(path=str(tmp_path))
    with pytest.raises(InputError, match=message):
        build_corpus(source, ByteTokenizer(), cache=tmp_path / "cache")
    with pytest.raises(InputError, match=message):
        train_tokenizer(TokenizerConfig(kind="word"), iterate_documents(source))


def test_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    """A byte order mark of UTF-8 is skipped, so that the first line can begin a document and be JSON."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff# One\na\n# Two\nb\n".encode())
    assert read(path, document_start="# .*") == [b"# One\na\n", b"# Two\nb\n"]
    path.write_bytes('\ufeff{"text": "one"}\n'.encode())
    assert read(path, kind="jsonl") == [b"one"]
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(InputError, match=r"at byte offset 5 \(0xff\)"):
        read(path)


def test_the_text_before_a_wrong_byte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for wrong in (b"\xff", b"\xe7\x8c!", b"\0"):
        path.write_bytes(TEXT.encode() + wrong + TEXT.encode())
        with open_text(path) as stream:
            assert stream.read1(10_000) == TEXT.encode()
            for _ in range(2):
                with pytest.raises(InputError, match=f"at byte offset {len(TEXT.encode())} "):
                    stream.read1(10_000)
    path.write_bytes(b"%PDF-1.4\n\xe2\xe3")  # a known format holds no text
    with open_text(path) as stream, pytest.raises(InputError, match="it is a PDF file"):
        stream.read1(10_000)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_text_is_checked_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A character may begin in one block and end in the next; a wrong one is named by its own offset."""
    monkeypatch.setattr(content_module, "_BUFFER_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    with open_text(path) as stream:
        assert list(stream) == [line.encode() for line in (TEXT * 3).splitlines(keepends=True)]
    content = TEXT.encode()
    for offset in (12, 16, 23):
        path.write_bytes(content[:offset] + b"\xe7\x8c!" + content[offset:])
        with open_text(path) as stream, pytest.raises(InputError, match=rf"offset {offset} \(0xe7\)"):
            list(stream)
    path.write_bytes(content[:16] + b"\xe7\x8c")
    with open_text(path) as stream, pytest.raises(InputError, match=r"offset 16 \(0xe7\)"):
        stream.read()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_only_failures_of_reading_are_those_of_the_file(tmp_path: Path, compression: str) -> None:
    """An error of what is done with the text, such as a closed pipe, is not blamed on the file."""
    path = tmp_path / "a"
    path.write_bytes(COMPRESSIONS[compression](b"text" * 100_000))

    def stop_reading() -> None:
        with open_text(path) as stream:
            stream.read(1)
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stop_reading()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{path} cannot be read"), open_text(path) as stream:
        stream.read()
