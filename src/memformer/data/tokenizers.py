"""Between the content of documents and token ids: bytes, grey levels, byte-level BPE, words."""

import codecs
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import tokenizers
from numpy.typing import NDArray

from memformer.errors import InputError

UNKNOWN_WORD = "<unk>"
END_OF_LINE = "<eos>"

# A block of text is encoded by one thread, and a batch of blocks at once: enough to keep the threads busy, little
# enough that the package's bookkeeping (hundreds of bytes a token) stays small however long the document.
_BLOCK_CHARACTERS = 1 << 16
_BLOCKS_IN_BATCH = 32
STREAM_BLOCK_BYTES = 1 << 20


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer; ids are 0..vocab_size-1."""

    @property
    def kind(self) -> str:
        """Name of the kind of tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition, as hexadecimal digits: equal where and only where all ids mean the same."""

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the ids of a document's content; `name` is the document's, for messages."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the content that the ids stand for."""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield printable text as the ids come in; joined, it is the text of all of them."""


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint8, uint16 and uint32 (little-endian) that holds ids 0..vocab_size-1.

    Raises:
        InputError: There are more ids than uint32 has values, or none.
    """
    for dtype, num_values in (("<u1", 1 << 8), ("<u2", 1 << 16), ("<u4", 1 << 32)):
        if 1 <= vocab_size <= num_values:
            return np.dtype(dtype)
    raise InputError(f"vocab_size ({vocab_size}) must be from 1 to {1 << 32}")


def fingerprint_of(definition: Any) -> str:
    """Return the SHA-256 of a JSON value, written in the one canonical way."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def fingerprint_of_text(kind: str, definition: str) -> str:
    """Return the fingerprint of a tokenizer of text from its definition, as the file holds it."""
    return fingerprint_of({"kind": kind, "tokenizer": definition})


class ByteTokenizer:
    """Every byte is its own id."""

    kind = "bytes"
    vocab_size = 256

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_of({"kind": self.kind})

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return the bytes as ids, without copying them.

        Raises:
            InputError: The document is an image.
        """
        return np.frombuffer(_text_bytes(content, kind=self.kind, name=name), np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the ids as bytes.

        Raises:
            InputError: An id is not a byte.
        """
        return bytes(_checked_id(token, self.vocab_size) for token in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield characters as soon as their UTF-8 bytes are complete, U+FFFD for bytes that are not UTF-8.

        Raises:
            InputError: An id is not a byte.
        """
        return _decode_utf8(bytes((_checked_id(token, self.vocab_size),)) for token in ids)


class PixelTokenizer:
    """Every grey level is its own id; a document is one image in raster order.

    Args:
        levels: Number of grey levels, 2 to 256.
        height: Rows of an image.
        width: Pixels of a row.

    Raises:
        InputError: `levels` is out of range, or a side is not positive.
    """

    kind = "pixels"
    # Dark to light, on a dark terminal.
    _SHADES = " .:-=+*#%@"

    def __init__(self, levels: int, height: int, width: int) -> None:
        if not 2 <= levels <= 256:
            raise InputError(f"levels ({levels}) must be from 2 to 256")
        if height < 1 or width < 1:
            raise InputError(f"image height ({height}) and width ({width}) must be at least 1")
        self.levels = self.vocab_size = levels
        self.height = height
        self.width = width

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_of({"kind": self.kind, "levels": self.levels, "height": self.height, "width": self.width})

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return the pixels as ids.

        Raises:
            InputError: The document is a text, has another number of pixels, or a level out of range.
        """
        if isinstance(content, bytes):
            raise InputError(f"document {name} is a text; the {self.kind} tokenizer reads images")
        if content.size != self.height * self.width:
            raise InputError(
                f"document {name} has {content.size} pixels; the tokenizer's images have {self.height}x{self.width}"
            )
        if content.max() >= self.vocab_size:
            raise InputError(f"document {name} has grey level {content.max()}; it must be below {self.vocab_size}")
        return content.reshape(-1)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return one byte a pixel: its grey level.

        Raises:
            InputError: An id is not a grey level.
        """
        return bytes(_checked_id(token, self.vocab_size) for token in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield one character a pixel, darker or lighter, and a new line after every row.

        Raises:
            InputError: An id is not a grey level.
        """
        for position, token in enumerate(ids, start=1):
            shade = self._SHADES[_checked_id(token, self.vocab_size) * len(self._SHADES) // self.vocab_size]
            yield shade + "\n" if position % self.width == 0 else shade


class TextTokenizer:
    """Subwords or words, by the `tokenizers` package.

    `bpe` is byte-level byte-pair encoding: every text has ids and decoding them gives it back exactly. `word` splits
    at white space, a line's end is the word `<eos>`, and words out of the vocabulary become `<unk>` (the convention
    of WikiText); decoding puts one space between words. In both no token reaches over a line's end, so that long
    documents can be encoded in blocks of lines without changing an id.

    Args:
        kind: What `tokenizer` is.
        tokenizer: A tokenizer made by `train_tokenizer`.

    Raises:
        InputError: `tokenizer` has a hole in its ids, or is not of that kind.
    """

    def __init__(self, kind: Literal["bpe", "word"], tokenizer: tokenizers.Tokenizer) -> None:
        self.kind = kind
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.fingerprint = fingerprint_of_text(kind, tokenizer.to_str())
        names = [tokenizer.id_to_token(token) for token in range(self.vocab_size)]
        missing = {UNKNOWN_WORD, END_OF_LINE} - set(names) if kind == "word" else set()
        if None in names or missing:
            raise InputError(f"tokenizer of kind {kind!r} lacks tokens: {sorted(missing) or 'its ids have holes'}")
        self._words = [str(name) for name in names]
        self._pieces = [_piece_bytes(word) for word in self._words] if kind == "bpe" else []

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the ids of a text.

        Raises:
            InputError: The document is an image, or not UTF-8.
        """
        text = decode_utf8(_text_bytes(content, kind=self.kind, name=name), name=name)
        blocks = blocks_of_lines(text)
        dtype = smallest_dtype(self.vocab_size)
        parts = [np.empty(0, dtype)]
        while batch := list(islice(blocks, _BLOCKS_IN_BATCH)):
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.asarray(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the text of the ids in UTF-8, where they cut no character in two.

        Raises:
            InputError: An id is out of the vocabulary.
        """
        if self.kind == "bpe":
            return b"".join(self._pieces[_checked_id(token, self.vocab_size)] for token in ids)
        return "".join(self.decode_stream(ids)).encode()

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of the ids as soon as it is certain.

        Raises:
            InputError: An id is out of the vocabulary.
        """
        if self.kind == "bpe":
            yield from _decode_utf8(self._pieces[_checked_id(token, self.vocab_size)] for token in ids)
            return
        is_line_start = True
        for token in ids:
            word = self._words[_checked_id(token, self.vocab_size)]
            if word == END_OF_LINE:
                yield "\n"
            else:
                yield word if is_line_start else f" {word}"
            is_line_start = word == END_OF_LINE


def decode_utf8(content: bytes, *, name: str) -> str:
    """Return the text of a document.

    Raises:
        InputError: It is not UTF-8; the message says where.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"document {name} is not UTF-8 at byte offset {error.start} (0x{content[error.start]:02x}); "
            "a tokenizer of kind 'bytes' reads any content"
        ) from error


def blocks_of_lines(text: str) -> Iterator[str]:
    """Yield the text in blocks that end where a line ends, each about as long as `tokenizers` likes."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _BLOCK_CHARACTERS:
            end = text.rfind("\n", start, start + _BLOCK_CHARACTERS) + 1
            # A line longer than a block is left whole.
            end = end or text.find("\n", start + _BLOCK_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def encode_stream(tokenizer: Tokenizer, stream: io.BufferedIOBase, *, name: str) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the ids of a stream's bytes part by part; together they are those of the whole.

    Texts are cut where a line ends, so a line longer than a part is held whole; bytes are cut anywhere.

    Raises:
        InputError: The stream cannot be read, or is not UTF-8 and the tokenizer reads text.
    """
    rest, start = b"", 0
    while True:
        try:
            # What has arrived, not a whole block: what is read may be a pipe that goes on for ever.
            block = stream.read1(STREAM_BLOCK_BYTES)
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
        end = len(block) if tokenizer.kind == "bytes" or not block else block.rfind(b"\n") + 1
        content, rest = (rest + block[:end], block[end:]) if end or not block else (b"", rest + block)
        if content:
            yield tokenizer.encode(content, name if start == 0 else f"{name}, from byte {start} on,")
            start += len(content)
        if not block:
            return


def _text_bytes(content: bytes | NDArray[np.uint8], *, kind: str, name: str) -> bytes:
    if not isinstance(content, bytes):
        raise InputError(f"document {name} is an image; a tokenizer of kind {kind!r} reads texts")
    return content


def _checked_id(token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise InputError(f"token id ({token}) must be from 0 to {vocab_size - 1}")
    return int(token)


def _decode_utf8(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _byte_of_character() -> dict[str, int]:
    # Byte-level BPE writes each byte as one visible character: itself where it is visible in Latin-1, else one of
    # the characters from U+0100 on, in the order of the bytes. `tokenizers` does not expose the table.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _piece_bytes(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError as error:
        raise InputError(f"token {piece!r} of a tokenizer of kind 'bpe' is not byte-level") from error
