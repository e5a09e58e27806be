"""Token ids of a stream, part by part, as it arrives."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizers import Tokenizer
from memformer.errors import InputError

STREAM_BLOCK_BYTES = 1 << 20
# Kinds of tokenizers of which no token crosses the end of a line (of bytes: any cut).
_CUT_KINDS = frozenset({"bytes", "bpe", "word", "bins"})

# Content, and its token ids.
EncodedPart = tuple[bytes, NDArray[np.integer[Any]]]
Encode = Callable[[bytes, str], NDArray[np.integer[Any]]]


def encode_parts(
    tokenizer: Tokenizer, stream: io.BufferedIOBase, *, name: str, encode: Encode | None = None
) -> Iterator[EncodedPart]:
    """Yield the content of a binary stream part by part with its token ids, as `encode_blocks`.

    Raises:
        InputError: The stream cannot be read, or is not UTF-8 and the tokenizer needs text.
    """
    return encode_blocks(tokenizer, read_blocks(stream, name), name=name, encode=encode)


def encode_blocks(
    tokenizer: Tokenizer, blocks: Iterable[bytes], *, name: str, encode: Encode | None = None
) -> Iterator[EncodedPart]:
    """Yield the content of blocks of bytes part by part, with its token ids; joined, they are those of the whole.

    Text is cut at line ends, so a line longer than a part is held in memory whole. Bytes are cut anywhere. If a row of
    a series is refused, the rows before it are yielded first. Nothing is known of tokenizers of other kinds
    (pretrained, or a user's own), so for them the whole text is held in memory and is one part, which `encode` encodes
    if it is given.

    Raises:
        InputError: The content is not UTF-8 and the tokenizer needs text.
    """
    if tokenizer.kind not in _CUT_KINDS:
        content = b"".join(blocks)
        yield content, (encode or tokenizer.encode)(content, name)
        return
    start, num_lines = 0, 0
    for content in blocks if tokenizer.kind == "bytes" else whole_lines(blocks):
        if content and tokenizer.kind == "bins":
            lines: list[EncodedPart] = []
            try:
                lines.extend(encode_lines(tokenizer, content, name=name, num_lines_before=num_lines))
            except InputError:
                if lines:
                    yield _joined(lines)
                raise
            yield _joined(lines)
            num_lines += len(lines)
        elif content:
            yield content, tokenizer.encode(content, name if start == 0 else f"{name}, from byte {start} on,")
            start += len(content)


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of blocks in parts that end with a line, as soon as its end arrives; and what is left at last."""
    rest: list[bytes] = []  # joined once: a line may be longer than many blocks
    for block in blocks:
        if end := block.rfind(b"\n") + 1:
            yield b"".join([*rest, block[:end]])
            rest = []
        rest.append(block[end:])
    if left := b"".join(rest):
        yield left


def _joined(lines: list[EncodedPart]) -> EncodedPart:
    return b"".join(content for content, _ in lines), np.concatenate([ids for _, ids in lines])


def encode_lines(tokenizer: Tokenizer, content: bytes, *, name: str, num_lines_before: int) -> Iterator[EncodedPart]:
    """Yield every line with its token ids, for tokenizers of which no token crosses the end of a line.

    Args:
        tokenizer: The tokenizer.
        content: Whole lines.
        name: Name of the text in messages, which also give the number of the line.
        num_lines_before: Number of lines of the text before `content`.

    Raises:
        InputError: A line is refused; those before it are yielded.
    """
    for number, line in enumerate(io.BytesIO(content), num_lines_before + 1):
        yield line, tokenizer.encode(line, f"{name}, line {number:,}")


def blocks_of(content: bytes) -> Iterator[bytes]:
    """Yield content in blocks; empty content is one block."""
    for start in range(0, max(len(content), 1), STREAM_BLOCK_BYTES):
        yield content[start : start + STREAM_BLOCK_BYTES]


def read_blocks(stream: io.BufferedIOBase, name: str) -> Iterator[bytes]:
    """Yield the bytes of a stream in blocks, as they arrive.

    Raises:
        InputError: The stream cannot be read.
    """
    try:
        # `read1` returns the bytes that have arrived, not a whole block: the stream may be an endless pipe.
        while block := stream.read1(STREAM_BLOCK_BYTES):
            yield block
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
