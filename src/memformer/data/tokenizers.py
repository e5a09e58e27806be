"""Tokenizers between document content and token ids: bytes, grey levels, byte-level BPE, words."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import tokenizers
from numpy.typing import NDArray

from memformer.data.tokenizer_pipelines import END_OF_LINE, check_pipeline
from memformer.errors import InputError
from memformer.utils.checks import Integer, check_integer
from memformer.utils.words import with_article

# One thread encodes a block of text, and one call encodes a batch of blocks: enough to keep the threads busy, and few
# enough that the package's bookkeeping (hundreds of bytes per token) stays small for documents of any length.
_BLOCK_CHARACTERS = 1 << 16
_BLOCKS_IN_BATCH = 32


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a tokenizer; its ids are 0..vocab_size-1."""

    @property
    def kind(self) -> str:
        """Name of the tokenizer's kind."""

    @property
    def vocab_size(self) -> int:
        """Number of different token ids."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition in hexadecimal digits; equal if and only if all ids mean the same."""

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the token ids of a document's content; `name` is the document's name in messages."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the content that the token ids represent."""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield printable text while the ids arrive; joined, the parts are the text of all ids."""


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint8, uint16 and uint32 (little-endian) that can hold ids 0..vocab_size-1.

    Raises:
        InputError: `vocab_size` is not positive, or exceeds the number of uint32 values.
    """
    for dtype, num_values in (("<u1", 1 << 8), ("<u2", 1 << 16), ("<u4", 1 << 32)):
        if 1 <= vocab_size <= num_values:
            return np.dtype(dtype)
    raise InputError(f"vocab_size ({vocab_size}) must be from 1 to {1 << 32}")


def fingerprint_of(definition: Any) -> str:
    """Return the SHA-256 of a JSON value, serialized with sorted keys."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def fingerprint_of_text(kind: str, definition: str) -> str:
    """Return the fingerprint of a text tokenizer from its definition, the content of its file."""
    return fingerprint_of({"kind": kind, "tokenizer": definition})


class ByteTokenizer:
    """A tokenizer whose token ids are the bytes themselves."""

    kind = "bytes"
    vocab_size = 256

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_of({"kind": self.kind})

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return the bytes as token ids, without a copy.

        Raises:
            InputError: The document is an image.
        """
        return np.frombuffer(text_bytes(content, kind=self.kind, name=name), np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the ids as bytes.

        Raises:
            InputError: An id is not a byte.
        """
        return bytes(check_token_id(token, self.vocab_size) for token in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield characters as soon as their UTF-8 bytes are complete, and U+FFFD for bytes that are not UTF-8.

        Raises:
            InputError: An id is not a byte.
        """
        return join_utf8(bytes((check_token_id(token, self.vocab_size),)) for token in ids)


class PixelTokenizer:
    """A tokenizer whose token ids are grey levels; a document is one image in raster order.

    Args:
        levels: Number of grey levels, 2 to 256.
        height: Rows of an image.
        width: Pixels of a row.

    Raises:
        InputError: `levels` is out of range, or `height` or `width` is not positive.
    """

    kind = "pixels"
    # From dark to light on a dark terminal.
    _SHADES = " .:-=+*#%@"

    def __init__(self, levels: Integer, height: Integer, width: Integer) -> None:
        self.levels = self.vocab_size = check_integer("levels", levels, 2, 256)
        self.height = check_integer("image height", height, 1)
        self.width = check_integer("image width", width, 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_of({"kind": self.kind, "levels": self.levels, "height": self.height, "width": self.width})

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return the pixels as token ids.

        Raises:
            InputError: The document is text, has another number of pixels, or a level out of range.
        """
        if isinstance(content, bytes):
            raise InputError(f"document {name} is text; the {self.kind} tokenizer reads images")
        if content.size != self.height * self.width:
            raise InputError(
                f"document {name} has {content.size} pixels; the tokenizer's images have {self.height}x{self.width}"
            )
        if content.dtype.kind not in "iu":
            raise InputError(f"document {name} has dtype {content.dtype}; grey levels must be integers")
        for level in (content.min(), content.max()):
            if not 0 <= level < self.vocab_size:
                raise InputError(f"document {name} has grey level {level}; it must be from 0 to {self.vocab_size - 1}")
        return content.reshape(-1)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return one byte per pixel: its grey level.

        Raises:
            InputError: An id is not a grey level.
        """
        return bytes(check_token_id(token, self.vocab_size) for token in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield one character per pixel, chosen by grey level, and a newline after every row.

        Raises:
            InputError: An id is not a grey level.
        """
        for position, token in enumerate(ids, start=1):
            shade = self._SHADES[check_token_id(token, self.vocab_size) * len(self._SHADES) // self.vocab_size]
            yield shade + "\n" if position % self.width == 0 else shade


class TextTokenizer:
    """A subword or word tokenizer that uses the `tokenizers` package.

    `bpe` is byte-level byte-pair encoding: it encodes every text, and decoding restores the text exactly. `word` splits
    at white space, encodes the end of a line as `<eos>` and words outside the vocabulary as `<unk>` (the convention of
    WikiText); decoding puts one space between words. In both, no token crosses the end of a line, so long documents can
    be encoded in blocks of lines without changing an id.

    Args:
        kind: Kind of `tokenizer`.
        tokenizer: A tokenizer with the steps of those that `train_tokenizer` makes; the vocabulary may differ. It is
            copied.

    Raises:
        InputError: A step of `tokenizer` differs (for example truncation, a normalizer or added tokens), which would
            cut or change the text, or its vocabulary lacks tokens.
    """

    def __init__(self, kind: Literal["bpe", "word"], tokenizer: tokenizers.Tokenizer) -> None:
        self.kind = kind
        definition = tokenizer.to_str()
        check_pipeline(kind, definition)
        # A copy, because the caller could change the steps afterwards.
        self.tokenizer = tokenizers.Tokenizer.from_str(definition)
        self.vocab_size = tokenizer.get_vocab_size()
        self.fingerprint = fingerprint_of_text(kind, definition)
        self._words = [str(tokenizer.id_to_token(token)) for token in range(self.vocab_size)]
        self._pieces = [piece_bytes(word, kind=kind) for word in self._words] if kind == "bpe" else []

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the token ids of a text.

        Raises:
            InputError: The document is an image, or not UTF-8.
        """
        text = decode_utf8(text_bytes(content, kind=self.kind, name=name), name=name)
        blocks = blocks_of_lines(text)
        dtype = smallest_dtype(self.vocab_size)
        parts = [np.empty(0, dtype)]
        while batch := list(islice(blocks, _BLOCKS_IN_BATCH)):
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.asarray(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the text of the token ids in UTF-8; it is incomplete where the ids end within a character.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        if self.kind == "bpe":
            return b"".join(self._pieces[check_token_id(token, self.vocab_size)] for token in ids)
        return "".join(self.decode_stream(ids)).encode()

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of the token ids as soon as its characters are complete.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        if self.kind == "bpe":
            yield from join_utf8(self._pieces[check_token_id(token, self.vocab_size)] for token in ids)
            return
        is_line_start = True
        for token in ids:
            word = self._words[check_token_id(token, self.vocab_size)]
            if word == END_OF_LINE:
                yield "\n"
            else:
                yield word if is_line_start else f" {word}"
            is_line_start = word == END_OF_LINE


def decode_utf8(content: bytes, *, name: str) -> str:
    """Return a document's content as a string.

    Raises:
        InputError: The content is not UTF-8; the message gives the byte offset.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"document {name} is not UTF-8 at byte offset {error.start} (0x{content[error.start]:02x}); "
            "a tokenizer of kind 'bytes' reads any content"
        ) from error


def blocks_of_lines(text: str) -> Iterator[str]:
    """Yield the text in blocks that end at line ends; a block exceeds the block size only for a longer line."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _BLOCK_CHARACTERS:
            end = text.rfind("\n", start, start + _BLOCK_CHARACTERS) + 1
            # A line longer than a block is not split.
            end = end or text.find("\n", start + _BLOCK_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def text_bytes(content: bytes | NDArray[np.uint8], *, kind: str, name: str) -> bytes:
    """Return a document's content, which must be a text.

    Raises:
        InputError: The document is an image.
    """
    if not isinstance(content, bytes):
        what = "an image" if isinstance(content, np.ndarray) else with_article(type(content).__name__)
        raise InputError(f"document {name} is {what}; a tokenizer of kind {kind!r} reads text, as bytes of UTF-8")
    return content


def check_token_id(token: int, vocab_size: int) -> int:
    """Return a token id as an int, after checking that it is in the vocabulary.

    Raises:
        InputError: It is not.
    """
    if not 0 <= token < vocab_size:
        raise InputError(f"token id ({token}) must be from 0 to {vocab_size - 1}")
    return int(token)


def join_utf8(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the characters of pieces of UTF-8 as soon as they are complete, and U+FFFD for bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _byte_of_character() -> dict[str, int]:
    # Byte-level BPE represents each byte by one visible character: its Latin-1 character if that is visible, otherwise
    # one of the characters from U+0100 on, in byte order. `tokenizers` does not expose this table.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def piece_bytes(piece: str, *, kind: str) -> bytes:
    """Return the bytes that a token of byte-level BPE stands for.

    Raises:
        InputError: The token is not byte-level.
    """
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError as error:
        raise InputError(f"token {piece!r} of a tokenizer of kind {kind!r} is not byte-level") from error
