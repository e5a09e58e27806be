"""The prompt of `memformer generate`, read part by part."""

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data import Tokenizer
from memformer.data.content import open_text
from memformer.data.tokenizers import encode_stream
from memformer.errors import InputError
from memformer.utils.files import user_path

# Prompt tokens fed to the session per call. A signal takes effect only between two calls.
_PIECE_TOKENS = 4096


class Prompt:
    """An open prompt.

    Args:
        text: The prompt's text, as a stream of bytes.
        name: Name of the prompt in messages.
        source: Counts the bytes read for `text`, before decompression.
        size: Size in bytes, before decompression; None if it is unknown.

    Attributes:
        size: As above.
        num_bytes: Number of bytes up to the end of the last piece.
    """

    def __init__(self, text: io.BufferedIOBase, name: str, source: "_Counted", *, size: int | None) -> None:
        self.size = size
        self.num_bytes = 0
        self._text = text
        self._name = name
        self._source = source

    def pieces(self, tokenizer: Tokenizer) -> Iterator[NDArray[np.integer[Any]]]:
        """Yield the token ids in pieces of at most `_PIECE_TOKENS`.

        Raises:
            InputError: The prompt cannot be read or is not UTF-8 text.
        """
        before = 0
        for part in encode_stream(tokenizer, self._text, name=self._name):
            read = self._source.num_bytes
            for start in range(0, len(part), _PIECE_TOKENS):
                end = min(start + _PIECE_TOKENS, len(part))
                self.num_bytes = before + (read - before) * end // len(part)
                yield part[start:end]
            before = read


class _Counted(io.RawIOBase):
    """A stream whose bytes are counted as they are read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived of at most the buffer's size; return the number of bytes, 0 at the end."""
        block = self._stream.read1(len(buffer))
        buffer[: len(block)] = block
        self.num_bytes += len(block)
        return len(block)


@contextmanager
def open_prompt(text: str | None, file: str | None, *, option: str = "--prompt_file") -> Iterator[Prompt]:
    """Open a prompt, or another text, which may not fit in memory.

    Args:
        text: The prompt itself. None: empty, unless there is a file.
        file: File with the prompt; "-" reads stdin.
        option: Option that named the file, for messages.

    Yields:
        The prompt.

    Raises:
        InputError: The prompt cannot be read, or both a text and a file are given.
    """
    if text is not None and file is not None:
        raise InputError("--prompt and --prompt_file are both given; give only one of them")
    if file == "-" and sys.stdin is None:
        raise InputError(f"{option} - reads stdin, but stdin is closed")
    with ExitStack() as stack:
        if file is None:
            # Python decodes non-UTF-8 bytes of the command line to surrogates; surrogateescape restores the bytes.
            content = (text or "").encode("utf-8", "surrogateescape")
            source = _Counted(io.BytesIO(content))
            yield Prompt(io.BufferedReader(source), "prompt", source, size=len(content))
            return
        name, stream = ("stdin", sys.stdin.buffer) if file == "-" else (file, stack.enter_context(_open(file)))
        source = _Counted(stream)
        # A buffered stream, because `open_text` reads the beginning before it knows how to read the rest.
        opened = stack.enter_context(open_text(user_path(name), stream=io.BufferedReader(source)))
        yield Prompt(opened, name, source, size=_file_size(stream))


def _open(file: str) -> Any:
    try:
        return user_path(file).open("rb")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _file_size(stream: Any) -> int | None:
    """Return the size of a regular file in bytes; None for a pipe or another stream."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
