"""Tokenizers made elsewhere and saved as tokenizer.json, checked for what would change a text."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from memformer.data.tokenizers import (
    Tokenizer,
    check_token_id,
    decode_utf8,
    fingerprint_of_text,
    join_utf8,
    piece_bytes,
    smallest_dtype,
    text_bytes,
)
from memformer.errors import InputError
from memformer.utils.checks import shown
from memformer.utils.files import user_path

TOKENIZER_FILE = "tokenizer.json"

# SentencePiece writes a space as this character, so it cannot tell the two apart.
_SPACE_MARK = "\u2581"
# Texts that tokenizers often change: case, spaces, ends of lines, composed and decomposed characters, compatibility
# characters, control characters, rare characters and long words.
_PROBES = (
    "the cat",
    "The CAT",
    " a",
    "a ",
    "  a  b   c",
    "\ta\n\n b\r\n\r c\n",
    "don't , . isn 't !",
    "1 23 4567 12,345.67",
    "é e\u0301 Å A\u030a",
    "\ufb01 \uff21 ½ ² \u3000",
    "日本語 한국어 हिन्दी العربية",
    "😀 👩\u200d👩\u200d👧",
    "\x00\x01\x7f\u00ad\u200b\ufeff\ufffd",
    "a" * 300,
    # Every character up to U+3000, and then one of every 97.
    "".join(chr(code) for code in range(0x3000) if code != ord(_SPACE_MARK)),
    "".join(chr(code) for code in range(0x3000, 0x110000, 97) if not 0xD800 <= code < 0xE000),
)


class PretrainedTokenizer:
    """A text tokenizer of the `tokenizers` package that was made elsewhere; it restores every text exactly.

    A document is tokenized as a whole, so its ids are those that the package gives for it, whatever its length. If the
    tokenizer reads the rare character U+2581 as a space, as those of SentencePiece do, texts with it are refused.

    Args:
        tokenizer: The tokenizer. It is copied.

    Raises:
        InputError: The tokenizer would cut texts, add tokens to them or change them.
    """

    kind = "pretrained"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        definition = tokenizer.to_str()
        fields = json.loads(definition)
        # A copy, because the caller could change the steps afterwards.
        self.tokenizer = tokenizers.Tokenizer.from_str(definition)
        _check_steps(self.tokenizer, fields)
        _check_probes(self.tokenizer, fields)
        self._loses_mark = _round_trip(self.tokenizer, _SPACE_MARK) != _SPACE_MARK
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.fingerprint = fingerprint_of_text(self.kind, definition)
        # Bytes of each token, if tokens are bytes: the package decodes an incomplete character to U+FFFD.
        self._pieces: list[bytes] | None = None
        if (fields["decoder"] or {}).get("type") == "ByteLevel":
            added = {token["id"] for token in fields["added_tokens"]}
            self._pieces = [b""] * self.vocab_size
            for word, token in ids.items():
                self._pieces[token] = word.encode() if token in added else piece_bytes(word, kind=self.kind)

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the token ids of a text.

        Raises:
            InputError: The document is an image, or not UTF-8, or the tokenizer would change it.
        """
        text = decode_utf8(text_bytes(content, kind=self.kind, name=name), name=name)
        if self._loses_mark and _SPACE_MARK in text:
            raise InputError(f"document {name} has the character U+2581, which its tokenizer reads as a space")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        found = self._bytes(ids).decode("utf-8", "replace")
        if found != text:
            raise InputError(f"document {name} cannot be read: its tokenizer {_first_change(text, found)}")
        return np.asarray(ids, smallest_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the text of the token ids in UTF-8.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return self._bytes([check_token_id(token, self.vocab_size) for token in ids])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of the token ids as soon as its characters are complete.

        With byte fallback, bytes that are no character may become another text than in `decode`.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        checked = (check_token_id(token, self.vocab_size) for token in ids)
        if self._pieces is not None:
            yield from join_utf8(self._pieces[token] for token in checked)
            return
        # A token's text may depend on the tokens before it, so the last tokens are decoded with and without the next.
        before: list[int] = []
        new: list[int] = []
        for token in checked:
            new.append(token)
            text, known = self._text([*before, *new]), self._text(before)
            if len(text) > len(known) and not text.endswith("\ufffd"):
                yield text[len(known) :]
                before, new = new, []
        if rest := self._text([*before, *new])[len(self._text(before)) :]:
            yield rest

    def _bytes(self, ids: list[int]) -> bytes:
        if self._pieces is not None:
            return b"".join([self._pieces[token] for token in ids])
        return self._text(ids).encode()

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def encode_after(tokenizer: Tokenizer, content: bytes, name: str) -> NDArray[np.integer[Any]]:
    """Return the token ids of a text that goes on with another one.

    Encoded alone, a text gets a space in front of it from a SentencePiece tokenizer. So it is encoded behind a
    character, whose ids are left out.

    Raises:
        InputError: As `Tokenizer.encode`.
    """
    if tokenizer.kind == "pretrained" and _adds_space(tokenizer):
        for before in (b"\n", b".", b"0", b"a"):
            known, ids = tokenizer.encode(before, name), tokenizer.encode(before + content, name)
            if np.array_equal(ids[: len(known)], known):
                return ids[len(known) :]
    return tokenizer.encode(content, name)


def _adds_space(tokenizer: Tokenizer) -> bool:
    ids = [int(token) for text in (b"\n", b"a") for token in tokenizer.encode(text, "probe")]
    return tokenizer.decode(ids) != b"\na"


# So many tokens before a text are enough to decode behind them: the last that is no part of a character is among them.
LAST_TOKENS = 64


def decode_after(tokenizer: Tokenizer, before: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text that token ids add to that of the tokens before them, as `decode_stream` does.

    Decoded alone, the ids of a SentencePiece tokenizer lose the space that they begin with. So they are decoded behind
    the last of the tokens before them that is no part of a character.
    """
    if tokenizer.kind != "pretrained":
        yield from tokenizer.decode_stream(ids)
        return
    last = next(([token] for token in reversed(before) if "\ufffd" not in _text_of(tokenizer, [token])), [])
    known = len(_text_of(tokenizer, last))
    for text in tokenizer.decode_stream(chain(last, ids)):
        if added := text[known:]:
            yield added
        known = max(0, known - len(text))


def stand_in(tokenizer: Tokenizer) -> list[int]:
    """Return ids that stand for a text whose own are not known, to decode behind them as `decode_after` does.

    They are those of a character, and none unless the text of a token depends on that before it.
    """
    return tokenizer.encode(b"a", "probe").tolist() if tokenizer.kind == "pretrained" else []


def _text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return "".join(tokenizer.decode_stream(ids))


def read_outside_tokenizer(path: str | Path) -> PretrainedTokenizer:
    """Return the tokenizer in a tokenizer.json, or in a folder that holds one.

    Raises:
        InputError: The file is missing or no tokenizer, or the tokenizer would cut or change texts.
    """
    file = user_path(path)
    file = file / TOKENIZER_FILE if file.is_dir() else file
    try:
        definition = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"{file} cannot be read: {reason}") from error
    try:
        return PretrainedTokenizer(parse_definition(definition))
    except InputError as error:
        raise InputError(f"{file} cannot be used: {error}") from error


def parse_definition(definition: str) -> tokenizers.Tokenizer:
    """Return the tokenizer that a tokenizer.json describes.

    Raises:
        InputError: The `tokenizers` package cannot read it.
    """
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except BaseException as error:
        # The package raises plain `Exception`, and panics on some definitions with one that is not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"the tokenizers package cannot read it: {error}") from error


def _check_steps(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any]) -> None:
    for step, effect in (("truncation", "cut documents"), ("padding", "add tokens to documents")):
        if fields.get(step) is not None:
            raise InputError(f"the tokenizer has {step}, which would {effect}; set {step} to null in tokenizer.json")
    if fields["model"].get("dropout"):
        raise InputError(
            f"the tokenizer's model has dropout ({fields['model']['dropout']}), which draws tokens at random; "
            "set it to null in tokenizer.json"
        )
    plain, full = (tokenizer.encode(_PROBES[0], add_special_tokens=added) for added in (False, True))
    if plain.ids != full.ids:
        extra = [token for token in full.tokens if token not in plain.tokens]
        raise InputError(
            f"the tokenizer's post_processor adds tokens to every text ({', '.join(extra)}); "
            "set post_processor to null in tokenizer.json"
        )


def _check_probes(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any]) -> None:
    """Check that texts come back from encoding and decoding.

    Raises:
        InputError: One does not; the message gives it, and the step that is the likely reason.
    """
    added = [f"a {token['content']} b{token['content']}c" for token in fields["added_tokens"]]
    for text in (*_PROBES, *added):
        if _round_trip(tokenizer, text) == text:
            continue
        # The shortest part of the text that shows it.
        wrong = next((character for character in text if _round_trip(tokenizer, character) != character), text)
        ids = tokenizer.encode(wrong, add_special_tokens=False).ids
        unknown = fields["model"].get("unk_token")
        is_unknown = not ids or (unknown is not None and unknown not in wrong and tokenizer.token_to_id(unknown) in ids)
        if is_unknown or _unigram_unknown(fields) in ids:
            raise InputError(
                f"the tokenizer has no tokens for {_escaped(wrong)}, which would be lost; "
                "it needs byte-level tokens or byte fallback"
            )
        step = "normalizer" if fields.get("normalizer") is not None else "pre_tokenizer or decoder"
        kind = (fields.get("normalizer") or {}).get("type", "")
        raise InputError(
            f"the tokenizer changes texts: {_escaped(wrong)} becomes {_escaped(_round_trip(tokenizer, wrong))}, "
            f"probably because of its {' '.join(filter(None, (step, kind)))}"
        )


def _first_change(text: str, found: str) -> str:
    """Return what a tokenizer makes of a text, where the two begin to differ."""
    pairs = enumerate(zip(text, found, strict=False))
    place = next((index for index, (old, new) in pairs if old != new), min(len(text), len(found)))
    old, new = (each[max(0, place - 10) : place + 10] for each in (text, found))
    return f"changes {_escaped(old)} at character {place} to {_escaped(new)}"


def _escaped(text: str) -> str:
    # Composed and decomposed characters look the same.
    return shown(text).encode("ascii", "backslashreplace").decode()


def _unigram_unknown(fields: dict[str, Any]) -> int | None:
    unknown = fields["model"].get("unk_id")
    return unknown if isinstance(unknown, int) else None


def _round_trip(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return str(tokenizer.decode(ids, skip_special_tokens=False))
