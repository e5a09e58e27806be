"""Reading of files by what they hold, not by what they are called: decompression, and the check that text is text."""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from memformer.errors import InputError

try:
    # A part of Python from version 3.14 on; imported by name because type checkers know it from then on only.
    _zstd: Any = importlib.import_module("compression.zstd")
except ImportError:
    _zstd = None

_BUFFER_BYTES = 1 << 16
_HEAD_BYTES = 512


class _Decompressed(io.RawIOBase):
    """The content of compressed streams, one after the other, as `cat` and parallel compressors write them.

    Zeros behind a stream are skipped. `bz2.BZ2File` and `lzma.LZMAFile` end, without an error, where what follows a
    stream is not another one, although it may be one whose beginning is damaged.

    Args:
        stream: The compressed bytes.
        make_decompressor: Returns a decompressor of one stream.
    """

    def __init__(self, stream: io.BufferedReader, make_decompressor: Callable[[], Any]) -> None:
        self._stream = stream
        self._make_decompressor = make_decompressor
        self._decompressor = make_decompressor()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived of at most the buffer's size; return the number of bytes, 0 at the end.

        Raises:
            OSError, lzma.LZMAError: The data is damaged, or it is not compressed behind a stream.
            EOFError: The data ends within a stream.
        """
        block = b""
        while not block:
            given = b""
            if self._decompressor.eof:
                given = self._next_stream()
                if not given:
                    return 0
                self._decompressor = self._make_decompressor()
            elif self._decompressor.needs_input:
                given = self._stream.read1(_BUFFER_BYTES)
                if not given:
                    raise EOFError("the compressed data is cut off")
            block = self._decompressor.decompress(given, len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def _next_stream(self) -> bytes:
        """Return the first bytes of the next stream, or nothing at the end."""
        given = self._decompressor.unused_data.lstrip(b"\0")
        while not given and (block := self._stream.read1(_BUFFER_BYTES)):
            given = block.lstrip(b"\0")
        return given


# How compressed data begins. None of these beginnings is UTF-8 text, except bzip2's: "BZh", the block size and a
# magic number, which is another one if no block follows.
_COMPRESSED: tuple[tuple[re.Pattern[bytes], Callable[[io.BufferedReader], Any] | None], ...] = (
    (re.compile(rb"\x1f\x8b"), lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), lambda stream: _Decompressed(stream, bz2.BZ2Decompressor)),
    (re.compile(rb"\xfd7zXZ\0"), lambda stream: _Decompressed(stream, lzma.LZMADecompressor)),
    (re.compile(rb"\x28\xb5\x2f\xfd"), None if _zstd is None else _zstd.ZstdFile),
)
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, *(() if _zstd is None else (_zstd.ZstdError,)))

# Names of formats that are not text, for messages; the content has already been found not to be text.
_FORMATS = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text"),
    (rb"PAR1", "a parquet file"),
    (rb"ARROW1", "an Arrow file"),
    (rb"PK\x03\x04", "a zip archive (or a file in that format: docx, epub, npz)"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (rb"Rar!", "a RAR archive"),
    (rb".{257}ustar", "a tar archive"),
    (rb"\x04\x22\x4d\x18", "lz4-compressed data"),
    (rb"\x5d\0\0.{2}\0", "data in the old lzma format"),
    (rb"\x1f\x9d", "data compressed with compress"),
    (rb"%PDF", "a PDF file"),
    (rb"SQLite format 3\0", "an SQLite data base"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "an image"),
)


@contextmanager
def open_source(path: Path, *, stream: io.BufferedIOBase | None = None) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes; gzip, bzip2, xz and zstd content is decompressed, whatever the file is called.

    Args:
        path: The file; its name in messages.
        stream: An open binary stream to read instead of the file. It is not closed.

    Yields:
        A binary stream of the decompressed content. Reading from it raises an `InputError` where the file cannot be
        read, or its compressed data is damaged or truncated.

    Raises:
        InputError: The file cannot be opened, its compressed data is damaged at its beginning, or it is compressed with
            zstd and this Python has no module for it.
    """
    with ExitStack() as stack:
        with _failures_explained(path):
            opened = stack.enter_context(path.open("rb")) if stream is None else _buffered(stream)
            while (decompress := _decompressor(opened, path)) is not None:
                opened = _buffered(stack.enter_context(decompress(opened)))
        yield io.BufferedReader(_SourceReader(opened, path), _BUFFER_BYTES)


@contextmanager
def open_text(path: Path, *, stream: io.BufferedIOBase | None = None) -> Iterator[io.BufferedReader]:
    """Open a file as `open_source` does, and check its content to be UTF-8 text while it is read.

    A byte order mark of UTF-8 at the beginning is skipped.

    Args:
        path: The file; its name in messages.
        stream: An open binary stream to read instead of the file. It is not closed.

    Yields:
        A binary stream of the decompressed content. Reading from it raises an `InputError` at the first byte that is
        not UTF-8, or that is 0.

    Raises:
        InputError: As `open_source`.
    """
    with open_source(path, stream=stream) as opened:
        yield io.BufferedReader(_TextReader(opened, path), _BUFFER_BYTES)


def is_compressed(path: Path) -> bool:
    """Return whether `open_source` would decompress a file; False for a pipe, which is not read.

    Raises:
        InputError: The file cannot be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return any(beginning.match(head) for beginning, _ in _COMPRESSED)


def _buffered(stream: Any) -> io.BufferedReader:
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)


def _decompressor(stream: io.BufferedReader, path: Path) -> Callable[[io.BufferedReader], Any] | None:
    head = stream.peek(_HEAD_BYTES)
    for beginning, decompress in _COMPRESSED:
        if beginning.match(head):
            if decompress is None:
                raise InputError(
                    f"{path} is compressed with zstd, which Python reads from version 3.14 on; decompress it first"
                )
            return decompress
    return None


@contextmanager
def _failures_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"{path} cannot be read: {reason}") from error


class _SourceReader(io.RawIOBase):
    """The bytes of a stream; failures while they are read, and only those, are explained.

    Args:
        stream: The stream.
        path: Its name in messages.
    """

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self._stream = stream
        self._path = path

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived of at most the buffer's size; return the number of bytes, 0 at the end.

        Raises:
            InputError: The stream cannot be read.
        """
        # `read1` does not wait for a whole block: the stream may be an endless pipe. (`readinto1` may read twice.)
        with _failures_explained(self._path):
            block = self._stream.read1(len(buffer))
        buffer[: len(block)] = block
        return len(block)


class _TextReader(io.RawIOBase):
    """The bytes of a stream, checked to be UTF-8 text as they are read.

    Args:
        stream: The stream.
        path: Its name in messages.
    """

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        self._offset = len(stream.read(len(codecs.BOM_UTF8))) if self._head.startswith(codecs.BOM_UTF8) else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._refusal: InputError | None = None  # of the byte behind those that were read

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived of at most the buffer's size; return the number of bytes, 0 at the end.

        Raises:
            InputError: The bytes are not UTF-8 text; those before were returned by the call before.
        """
        block = b"" if self._refusal is not None else self._stream.read1(len(buffer))
        if self._refusal is None:
            block = self._text_of(block)
        if self._refusal is not None and not block:
            raise self._refusal
        buffer[: len(block)] = block
        return len(block)

    def _text_of(self, block: bytes) -> bytes:
        """Return the block up to the first byte that is no text, and keep the refusal of that byte."""
        # The decoder holds back the bytes of a character that is not complete yet.
        content = self._decoder.getstate()[0] + block
        wrong = content.find(b"\0")
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            wrong = error.start if wrong < 0 else min(wrong, error.start)
        self._offset += len(block)
        if wrong < 0:
            return block
        found = next((name for start, name in _FORMATS if re.match(start, self._head, re.DOTALL)), None)
        self._refusal = InputError(
            f"{self._path} is not UTF-8 text at byte offset {self._offset - len(content) + wrong} "
            f"(0x{content[wrong]:02x}): "
            + (f"it is {found}" if found else "it is binary or in another encoding; convert it to UTF-8 first")
        )
        return b"" if found else block[: max(wrong - (len(content) - len(block)), 0)]
