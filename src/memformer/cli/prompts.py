"""Texts given to a command: the prompt of `memformer generate`, the file of `memformer score`; read part by part."""

import io
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.cli.outside_values import OutsideValues
from memformer.data import Tokenizer
from memformer.data.content import open_text
from memformer.data.outside_tokenizers import encode_after
from memformer.data.streaming import encode_parts
from memformer.errors import InputError
from memformer.utils.files import user_path

# Prompt tokens fed to the session per call. A signal takes effect only between two calls.
_PIECE_TOKENS = 4096
_SECONDS_OF_WAITING = 1.0


class InputText:
    """An open text.

    Args:
        stream: The text as a stream of bytes, decompressed.
        name: Name of the text in messages.
        source: Counts the bytes read for `stream`, before decompression.
        size: Size in bytes, before decompression; None if it is unknown.

    Attributes:
        stream: As above.
        name: As above.
        size: As above.
        num_bytes: Number of bytes, before decompression, up to the end of the last piece of `pieces`.
    """

    def __init__(self, stream: io.BufferedIOBase, name: str, source: "_Counted", *, size: int | None) -> None:
        self.stream = stream
        self.name = name
        self.size = size
        self.num_bytes = 0
        self._source = source

    @property
    def num_bytes_read(self) -> int:
        """Number of bytes read so far, before decompression."""
        return self._source.num_bytes

    def pieces(self, tokenizer: Tokenizer, *, goes_on: bool = False) -> Iterator[NDArray[np.integer[Any]]]:
        """Yield the token ids in pieces of at most `_PIECE_TOKENS`; warn of values outside of the training data.

        Args:
            tokenizer: Encodes the text.
            goes_on: Whether the text goes on with another one (`encode_after`).

        Raises:
            InputError: The text cannot be read or is not UTF-8.
        """
        before, outside = 0, OutsideValues(tokenizer, self.name)
        encode = partial(encode_after, tokenizer) if goes_on else None
        for content, part in encode_parts(tokenizer, self.stream, name=self.name, encode=encode):
            outside.add(content)
            read = self._source.num_bytes
            for start in range(0, len(part), _PIECE_TOKENS):
                end = min(start + _PIECE_TOKENS, len(part))
                self.num_bytes = before + (read - before) * end // len(part)
                yield part[start:end]
            before = read


class _Counted(io.RawIOBase):
    """A stream whose bytes are counted as they are read.

    Args:
        stream: The stream.
        while_waiting: Called about once a second while nothing arrives. None: nothing is called.
    """

    def __init__(self, stream: Any, while_waiting: Callable[[], None] | None = None) -> None:
        self._stream = stream
        self._while_waiting = while_waiting
        self.num_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived of at most the buffer's size; return the number of bytes, 0 at the end."""
        # In steps, because the system may give a signal to another thread: it then ends no wait of this one.
        while not _has_arrived(self._stream):
            if self._while_waiting is not None:
                self._while_waiting()
        block = self._stream.read1(len(buffer))
        buffer[: len(block)] = block
        self.num_bytes += len(block)
        return len(block)


class _OpenedAtFirstRead(io.RawIOBase):
    """A text that is opened when it is read, because `open_text` waits for its beginning: a signal must end that wait.

    Args:
        path: Name of the text in messages.
        source: The text, still compressed.
        stack: Closes what was opened.
    """

    def __init__(self, path: Path, source: _Counted, stack: ExitStack) -> None:
        self._path = path
        self._source = source
        self._stack = stack
        self._text: io.BufferedReader | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read at most the buffer's size; return the number of bytes, 0 at the end."""
        if self._text is None:
            opened = open_text(self._path, stream=io.BufferedReader(self._source))
            self._text = self._stack.enter_context(opened)
        block = self._text.read1(len(buffer))  # not `readinto1`, which may read twice and wait
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def open_prompt(
    text: str | None, file: str | None, *, while_waiting: Callable[[], None] | None = None
) -> Iterator[InputText]:
    """Open a prompt, which may not fit in memory.

    Args:
        text: The prompt itself. None: empty, unless there is a file.
        file: File with the prompt; "-" reads stdin.
        while_waiting: As for `open_input`.

    Yields:
        The prompt.

    Raises:
        InputError: The prompt cannot be read, or both a text and a file are given.
    """
    if text is not None and file is not None:
        raise InputError("--prompt and --prompt_file are both given; give only one of them")
    if file is not None:
        with open_input(file, option="--prompt_file ", while_waiting=while_waiting) as opened:
            yield opened
        return
    # Python decodes non-UTF-8 bytes of the command line to surrogates; surrogateescape restores the bytes.
    content = (text or "").encode("utf-8", "surrogateescape")
    source = _Counted(io.BytesIO(content))
    yield InputText(io.BufferedReader(source), "prompt", source, size=len(content))


@contextmanager
def open_input(file: str, *, option: str = "", while_waiting: Callable[[], None] | None = None) -> Iterator[InputText]:
    """Open a text, which may never end.

    Args:
        file: The file; "-" reads stdin.
        option: Option that names the file, with a space, for messages.
        while_waiting: Called about once a second while a pipe has no data. None: nothing is called.

    Yields:
        The text.

    Raises:
        InputError: The file cannot be read, or is not UTF-8 text.
    """
    if file == "-" and sys.stdin is None:
        raise InputError(f"{option}- reads stdin, but stdin is closed")
    with ExitStack() as stack:
        name, stream = ("stdin", sys.stdin.buffer) if file == "-" else (file, stack.enter_context(_open(file)))
        source = _Counted(stream, while_waiting)
        opened = _OpenedAtFirstRead(user_path(name), source, stack)
        yield InputText(io.BufferedReader(opened), name, source, size=_file_size(stream))


def _open(file: str) -> Any:
    path = user_path(file)
    try:
        if sys.platform == "linux" and path.is_fifo():
            # Does not wait for a writer here, where no signal would end the wait; `_Counted` waits for the first byte.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "rb")
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{file or repr(file)} cannot be read: {error.strerror or error}") from error


def _file_size(stream: Any) -> int | None:
    """Return the size of a regular file in bytes; None for a pipe or another stream."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _has_arrived(stream: Any) -> bool:
    """Wait a second at most; return whether a read would not wait (True also where this cannot be known)."""
    try:
        return bool(select.select([stream.fileno()], [], [], _SECONDS_OF_WAITING)[0])
    except (OSError, ValueError):  # no file of the operating system; on Windows, anything but a socket
        return True
