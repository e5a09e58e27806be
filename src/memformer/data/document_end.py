"""A token that marks the end of every document, so that a model predicts where a document ends."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizers import PixelTokenizer, Tokenizer, fingerprint_of, smallest_dtype
from memformer.errors import InputError


class DocumentEndTokenizer:
    """A text tokenizer with one more token id, the last one, which stands for the end of a document.

    `encode` gives no such token, because a text may be a part of a document; `build_corpus` appends it to every
    document. Decoding gives no text for it.

    Args:
        inner: The tokenizer of the text.

    Raises:
        InputError: `inner` reads images, which all have the same size, or has an end-of-document token already.
    """

    def __init__(self, inner: Tokenizer) -> None:
        if isinstance(inner, PixelTokenizer):
            raise InputError("an end-of-document token is for texts; images all have the same number of pixels")
        if isinstance(inner, DocumentEndTokenizer):
            raise InputError("the tokenizer has an end-of-document token already")
        self.inner = inner
        self.kind = inner.kind
        self.document_end = inner.vocab_size
        self.vocab_size = inner.vocab_size + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return fingerprint_with_end(self.inner.fingerprint)

    def encode(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.integer[Any]]:
        """Return the token ids of a text, which may be a part of a document.

        Raises:
            InputError: As `inner`.
        """
        return self.inner.encode(content, name).astype(smallest_dtype(self.vocab_size), copy=False)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the text of the token ids, without the ends of documents.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return self.inner.decode([token for token in ids if token != self.document_end])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of the token ids as soon as its characters are complete, without the ends of documents.

        Raises:
            InputError: An id is outside the vocabulary.
        """
        return self.inner.decode_stream(token for token in ids if token != self.document_end)


def fingerprint_with_end(fingerprint: str) -> str:
    """Return the fingerprint of a `DocumentEndTokenizer` from that of its inner tokenizer."""
    return fingerprint_of({"tokenizer": fingerprint, "end_of_document": True})


def document_end_of(tokenizer: Tokenizer) -> int | None:
    """Return the token id of the end of a document; None if the tokenizer has none."""
    return tokenizer.document_end if isinstance(tokenizer, DocumentEndTokenizer) else None


def stop_tokens_of(tokenizer: Tokenizer) -> list[int]:
    """Return the token ids at which generation stops by itself: that of the end of a document, if there is one."""
    document_end = document_end_of(tokenizer)
    return [] if document_end is None else [document_end]


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer without the end-of-document token."""
    return tokenizer.inner if isinstance(tokenizer, DocumentEndTokenizer) else tokenizer
