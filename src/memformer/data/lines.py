"""Token ids of a text with the line in which each token begins, part by part."""

import io
from collections.abc import Iterator
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memformer.data.outside_tokenizers import encode_after
from memformer.data.streaming import encode_lines, read_blocks, whole_lines
from memformer.data.tokenizers import Tokenizer
from memformer.errors import InputError

# Tokens of a part, unless a line of subwords or words has more.
_PART_TOKENS = 4096
_LINE_END = ord("\n")


class TextPart(NamedTuple):
    """A part of a text. Joined, the parts are the text and its token ids.

    Attributes:
        content: The bytes of the text.
        token_ids: The token ids of these bytes.
        lines: For each token, the number of line ends in `content` before the token's first byte.
    """

    content: bytes
    token_ids: NDArray[np.integer[Any]]
    lines: NDArray[np.int64]


class LineReader:
    """Reads a text and yields its parts.

    Bytes are cut anywhere, so a line that has only begun is yielded as far as it has arrived. Subwords and words
    depend on the rest of their line: such a line is yielded when its end has arrived. Nothing is known of a tokenizer
    of kind pretrained, so for it the whole text is read first, and a token may cross the end of a line.

    Args:
        tokenizer: Tokenizer of the text.
        stream: The text as a stream of UTF-8, which may never end.
        name: Name of the text in messages.
        held: Beginning of the first line, which precedes the stream.
        goes_on: Whether the text goes on with another one (`encode_after`).

    Attributes:
        held: Bytes of a line whose end has not arrived; they are in no part yet.
        num_bytes_read: Number of bytes read from the stream.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stream: io.BufferedIOBase,
        *,
        name: str,
        held: bytes = b"",
        goes_on: bool = False,
    ) -> None:
        self.held = held
        self.num_bytes_read = 0
        self._num_lines = 0
        self._tokenizer = tokenizer
        self._stream = stream
        self._name = name
        self._goes_on = goes_on

    def parts(self, *, ends_line: bool = True) -> Iterator[TextPart]:
        """Yield the parts as they arrive.

        Args:
            ends_line: Whether the end of the stream ends the last line. False: the next stream may go on with it, so
                the beginning of a line of subwords or words stays in `held`.

        Raises:
            InputError: The stream cannot be read, or tokens cannot be assigned to lines.
        """
        if self._tokenizer.kind == "pretrained":
            content = b"".join([self.held, *self._blocks()])
            end = len(content) if ends_line else content.rfind(b"\n") + 1
            content, self.held = content[:end], content[end:]
            yield from self._cut(content)
            return
        blocks = chain([self.held], self._blocks())
        self.held = b""
        if self._tokenizer.kind == "bytes":
            for block in blocks:
                yield from self._bytes(block)
            return
        for content in whole_lines(blocks):
            if ends_line or content.endswith(b"\n"):
                yield from self._lines(content)
            else:
                self.held = content

    def _blocks(self) -> Iterator[bytes]:
        for block in read_blocks(self._stream, self._name):
            self.num_bytes_read += len(block)
            yield block

    def _bytes(self, content: bytes) -> Iterator[TextPart]:
        for start in range(0, len(content), _PART_TOKENS):
            piece = content[start : start + _PART_TOKENS]
            ids = self._tokenizer.encode(piece, self._name)
            is_end = np.frombuffer(piece, np.uint8) == _LINE_END
            yield TextPart(piece, ids, is_end.cumsum() - is_end)

    def _lines(self, content: bytes) -> Iterator[TextPart]:
        """Yield whole lines; their ids do not depend on each other, because no token crosses the end of a line.

        Raises:
            InputError: A line is refused; those before it are yielded.
        """
        lines: list[bytes] = []
        ids: list[NDArray[np.integer[Any]]] = []
        num_tokens = 0
        numbered = encode_lines(self._tokenizer, content, name=self._name, num_lines_before=self._num_lines)
        try:
            for line, line_ids in numbered:
                self._num_lines += 1
                lines.append(line)
                ids.append(line_ids)
                num_tokens += len(line_ids)
                if num_tokens >= _PART_TOKENS:
                    yield _joined(lines, ids)
                    lines, ids, num_tokens = [], [], 0
        except InputError:
            if lines:
                yield _joined(lines, ids)
            raise
        if lines:
            yield _joined(lines, ids)

    def _cut(self, content: bytes) -> Iterator[TextPart]:
        """Yield the parts of a text whose tokens can be cut nowhere but behind those that end with a line.

        Raises:
            InputError: The ends of lines in the tokens are not those of the text.
        """
        if not content:
            return
        encode = partial(encode_after, self._tokenizer) if self._goes_on else self._tokenizer.encode
        ids = encode(content, self._name)
        known, index = np.unique(ids, return_inverse=True)
        texts = [self._tokenizer.decode([int(token)]) for token in known]
        line_ends = np.array([text.count(b"\n") for text in texts], np.int64)[index]
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == _LINE_END) + 1
        if line_ends.sum() != len(ends):
            raise InputError(
                f"{self._name} cannot be scored by line: the tokens of its tokenizer hold {line_ends.sum():,} ends of "
                f"lines, the text {len(ends):,}"
            )
        lines = line_ends.cumsum() - line_ends
        ends_with_line = np.array([text.endswith(b"\n") for text in texts])[index]
        cuts = [0]
        for position in np.flatnonzero(ends_with_line) + 1:
            if position - cuts[-1] >= _PART_TOKENS:
                cuts.append(int(position))
        for start, end in pairwise([*cuts, len(ids)] if cuts[-1] < len(ids) else cuts):
            first = 0 if start == 0 else ends[lines[start] - 1]
            last = len(content) if end == len(ids) else ends[lines[end] - 1]
            yield TextPart(content[first:last], ids[start:end], lines[start:end] - lines[start])


def _joined(lines: list[bytes], ids: list[NDArray[np.integer[Any]]]) -> TextPart:
    counts = [len(line_ids) for line_ids in ids]
    return TextPart(b"".join(lines), np.concatenate(ids), np.repeat(np.arange(len(lines)), counts))
