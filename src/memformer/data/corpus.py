"""Corpora: the token ids of many documents in one array, on disk or in memory."""

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizers import smallest_dtype
from memformer.errors import CheckpointError, InputError, InputTypeError
from memformer.utils.checks import (
    Integer,
    Integers,
    Number,
    check_integer,
    check_integers,
    check_number,
    check_seed,
    shown,
)
from memformer.utils.files import user_path
from memformer.utils.token_ids import check_token_ids
from memformer.utils.words import counted

# Also part of the cache key: raise it when files are read in another way.
FORMAT_VERSION = 3
MANIFEST_FILE = "corpus.json"
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.bin"
DOCUMENTS_DTYPE = np.dtype("<i8")

_CHECKSUM_BLOCK_BYTES = 1 << 22


@final
class Corpus:
    """An immutable collection of documents as token ids; subsets share one token array.

    Created by `build_corpus`, `corpus_from_arrays` and `Corpus.open`.

    Args:
        name: Name of the corpus in messages.
        tokens: (num_tokens,) unsigned integers: the concatenated ids of all documents; may be a memory map.
        starts: (num_documents,) index in `tokens` of each document's first token.
        ends: (num_documents,) index in `tokens` after each document's last token.
        document_bytes: (num_documents,) size in bytes of each document's original content.
        vocab_size: Number of different token ids.
        tokens_crc32: CRC-32 of `tokens`.
    """

    def __init__(
        self,
        *,
        name: str,
        tokens: NDArray[Any],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        document_bytes: NDArray[np.int64],
        vocab_size: int,
        tokens_crc32: int,
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.document_lengths: NDArray[np.int64] = ends - starts
        self.document_bytes = document_bytes
        self._tokens = tokens
        self._tokens_crc32 = tokens_crc32
        self._starts = starts
        self._ends = ends

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits: equal only if the documents have the same token ids in the same order."""
        digest = hashlib.sha256(f"{self._tokens.dtype.str} {self._tokens_crc32}".encode())
        for positions in (self._starts, self._ends):
            digest.update(positions.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._starts)

    @property
    def num_tokens(self) -> int:
        """Total number of tokens of all documents."""
        return int(self.document_lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Total size in bytes of all documents' original content."""
        return int(self.document_bytes.sum())

    def document(self, index: Integer) -> NDArray[Any]:
        """Return a document's token ids as a view, which must not be modified.

        Raises:
            InputError: `index` is out of range.
        """
        index = check_integer("document index", index, 0, self.num_documents - 1)
        return self._tokens[self._starts[index] : self._ends[index]]

    def subset(self, indices: Integers) -> "Corpus":
        """Return a corpus of the chosen documents in the given order; it shares this corpus's token array.

        Raises:
            InputError: `indices` is empty or contains an index out of range.
            InputTypeError: An index is not an integer.
        """
        if not isinstance(indices, np.ndarray):
            indices = np.array(check_integers("document index", indices, 0, self.num_documents - 1), dtype=np.int64)
        chosen = indices.reshape(-1)
        if not chosen.size:
            raise InputError(f"a subset of {self.name} needs at least one document")
        if chosen.dtype.kind not in "iu":
            raise InputTypeError(f"document indices have dtype {chosen.dtype}; they must be integers")
        if chosen.min() < 0 or chosen.max() >= self.num_documents:
            wrong = chosen[(chosen < 0) | (chosen >= self.num_documents)][0]
            raise InputError(f"document index ({wrong}) must be from 0 to {self.num_documents - 1} in {self.name}")
        return Corpus(
            name=f"a subset of {self.name}",
            tokens=self._tokens,
            starts=self._starts[chosen],
            ends=self._ends[chosen],
            document_bytes=self.document_bytes[chosen],
            vocab_size=self.vocab_size,
            tokens_crc32=self._tokens_crc32,
        )

    def split(self, fraction: Number, seed: Integer) -> tuple["Corpus", "Corpus"]:
        """Return the training documents and the held-out documents, each in this corpus's order.

        Pieces cut by `max_document_tokens` count as documents, so adjacent pieces may end up on different sides.

        Args:
            fraction: Fraction of the documents to hold out, between 0 and 1. The number is rounded; at least 1 document
                is held out and at least 1 is left.
            seed: Seed of the random choice; at least 0.

        Raises:
            InputError: There are fewer than 2 documents, or an argument is out of range.
        """
        fraction = check_number("held-out fraction", fraction, above=0, below=1)
        seed = check_seed("held-out seed", seed)
        if self.num_documents < 2:
            raise InputError(
                f"{self.name} has {counted(self.num_documents, 'document')} of {counted(self.num_tokens, 'token')}; "
                f"holding some out needs at least 2 documents: give data.validation or more documents, or, except for "
                f"images, set data.max_document_tokens to at most {max(1, self.num_tokens // 2)} to cut documents up"
            )
        num_held_out = min(max(1, round(fraction * self.num_documents)), self.num_documents - 1)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(self.num_documents)
        return self.subset(np.sort(order[num_held_out:])), self.subset(np.sort(order[:num_held_out]))

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Return the corpus that `build_corpus` wrote into `folder`, after verifying its checksums.

        Every byte is read once for the checksums; the tokens then stay on disk as a memory map.

        Raises:
            CheckpointError: A file is missing, damaged or of another format version.
        """
        folder = user_path(folder)
        manifest = _read_manifest(folder / MANIFEST_FILE)
        for name, size, checksum in (
            (TOKENS_FILE, manifest["num_tokens"] * np.dtype(manifest["dtype"]).itemsize, manifest["tokens_crc32"]),
            (DOCUMENTS_FILE, manifest["num_documents"] * 2 * DOCUMENTS_DTYPE.itemsize, manifest["documents_crc32"]),
        ):
            _check_file(folder / name, num_bytes=size, checksum=checksum)
        ends, document_bytes = np.fromfile(folder / DOCUMENTS_FILE, DOCUMENTS_DTYPE).reshape(2, -1).astype(np.int64)
        if ends[-1] != manifest["num_tokens"] or np.any(np.diff(ends, prepend=0) < 1):
            raise CheckpointError(f"{folder / DOCUMENTS_FILE} is damaged: document ends must increase up to num_tokens")
        # A plain array view of the map: slicing a `np.memmap` is slower.
        tokens = np.asarray(np.memmap(folder / TOKENS_FILE, dtype=manifest["dtype"], mode="r"))
        return cls(
            name=f"corpus {manifest['name']}",
            tokens=tokens,
            starts=ends - np.diff(ends, prepend=0),
            ends=ends,
            document_bytes=document_bytes,
            vocab_size=manifest["vocab_size"],
            tokens_crc32=manifest["tokens_crc32"],
        )


def corpus_from_arrays(
    arrays: Iterable[Sequence[int] | NDArray[Any]], vocab_size: Integer, document_bytes: Integers | None = None
) -> Corpus:
    """Return an in-memory corpus of the given documents.

    Args:
        arrays: Token ids of each document: lists or 1-D arrays of integers.
        vocab_size: Number of different token ids.
        document_bytes: Size in bytes of each document's original content. None: one byte per token.

    Raises:
        InputError: There is no document, a document is empty or has an id outside the vocabulary, or `document_bytes`
            does not hold one positive count for each document.
        InputTypeError: An array does not hold integers.
    """
    vocab_size = check_integer("vocab_size", vocab_size, 1)
    dtype = smallest_dtype(vocab_size)
    if not isinstance(arrays, Iterable) or isinstance(arrays, str | bytes):
        raise InputTypeError(f"arrays ({shown(arrays)}) must hold the token ids of each document")
    documents = [check_document(array, vocab_size=vocab_size, name=str(index)) for index, array in enumerate(arrays)]
    if not documents:
        raise InputError("a corpus needs at least one document")
    for index, array in enumerate(documents):
        if not array.size:
            raise InputError(f"document {index} is empty; it must have at least one token")
    sizes = None if document_bytes is None else check_integers("document_bytes", document_bytes, 1)
    count = len(documents)
    if sizes is not None and len(sizes) != count:
        raise InputError(f"document_bytes ({len(sizes)} counts) must hold one for each of the {count} documents")
    ends = np.cumsum([array.size for array in documents], dtype=np.int64)
    lengths = np.diff(ends, prepend=0)
    tokens = np.concatenate([array.astype(dtype) for array in documents])
    tokens.flags.writeable = False  # as in a corpus on disk; a document is a part of this array
    return Corpus(
        name="corpus in memory",
        tokens=tokens,
        starts=ends - lengths,
        ends=ends,
        document_bytes=lengths if sizes is None else np.asarray(sizes, dtype=np.int64),
        vocab_size=vocab_size,
        tokens_crc32=zlib.crc32(tokens.tobytes()),
    )


def check_document(token_ids: object, *, vocab_size: int, name: str) -> NDArray[np.integer[Any]]:
    """Return the token ids of a document as an array.

    Raises:
        InputError: As `check_token_ids`; the message names the document.
        InputTypeError: The token ids are not integers.
    """
    try:
        return check_token_ids(token_ids, vocab_size=vocab_size)
    except InputError as error:
        raise type(error)(f"document {name}: {error}") from error


def serialize_manifest(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as canonical JSON, with a checksum of itself."""
    content = {**manifest, "manifest_crc32": zlib.crc32(json.dumps(manifest, sort_keys=True).encode())}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a corpus of format version {FORMAT_VERSION}")
    manifest.pop("manifest_crc32", None)
    # Compare all bytes, so that changed white space is found too.
    if serialize_manifest(manifest) != raw:
        raise CheckpointError(f"{path} is damaged: its checksum does not match; delete the folder to build it again")
    return manifest


def _check_file(path: Path, *, num_bytes: int, checksum: int) -> None:
    actual_checksum = 0
    try:
        actual_bytes = path.stat().st_size
        if actual_bytes != num_bytes:
            raise CheckpointError(
                f"{path} has {actual_bytes} bytes, but {MANIFEST_FILE} records {num_bytes}; delete the folder to "
                "build it again"
            )
        with path.open("rb") as file:
            while block := file.read(_CHECKSUM_BLOCK_BYTES):
                actual_checksum = zlib.crc32(block, actual_checksum)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if actual_checksum != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum does not match; delete the folder to build it again")
