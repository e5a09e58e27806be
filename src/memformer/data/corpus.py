"""The token ids of many documents, in one array on disk or in memory."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizers import smallest_dtype
from memformer.errors import CheckpointError, InputError, InputTypeError

FORMAT_VERSION = 1
MANIFEST_FILE = "corpus.json"
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.bin"
DOCUMENTS_DTYPE = np.dtype("<i8")

_CHECKSUM_BLOCK_BYTES = 1 << 22


@final
class Corpus:
    """Documents as token ids; never changed, and cheap to take parts of.

    Made by `build_corpus`, `corpus_from_arrays` and `Corpus.open`.

    Args:
        name: What to call it in messages.
        tokens: (num_tokens,) unsigned, the ids of all documents one after another; may be a memory map.
        starts: (num_documents,) where each document starts in `tokens`.
        ends: (num_documents,) where it ends.
        document_bytes: (num_documents,) number of bytes of each document's original content.
        vocab_size: Number of different ids.
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
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.document_lengths: NDArray[np.int64] = ends - starts
        self.document_bytes = document_bytes
        self._tokens = tokens
        self._starts = starts
        self._ends = ends

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._starts)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents together."""
        return int(self.document_lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all documents' original content together."""
        return int(self.document_bytes.sum())

    def document(self, index: int) -> NDArray[Any]:
        """Return a document's token ids, a view that must not be written to.

        Raises:
            InputError: There is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise InputError(f"document index ({index}) must be from 0 to {self.num_documents - 1} in {self.name}")
        return self._tokens[self._starts[index] : self._ends[index]]

    def subset(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> "Corpus":
        """Return a corpus of some documents, in the given order, that shares the tokens with this one.

        Raises:
            InputError: There is no index, or one that is not a document's.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if not chosen.size:
            raise InputError(f"a subset of {self.name} needs at least one document")
        if chosen.min() < 0 or chosen.max() >= self.num_documents:
            wrong = chosen[(chosen < 0) | (chosen >= self.num_documents)][0]
            raise InputError(f"document index ({wrong}) must be from 0 to {self.num_documents - 1} in {self.name}")
        return Corpus(
            name=f"a part of {self.name}",
            tokens=self._tokens,
            starts=self._starts[chosen],
            ends=self._ends[chosen],
            document_bytes=self.document_bytes[chosen],
            vocab_size=self.vocab_size,
        )

    def split(self, fraction: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """Return the documents to train on and those held out, each in the order they have here.

        What was cut by `max_document_tokens` counts as documents of its own, so neighbours may be parted.

        Args:
            fraction: Part of the documents to hold out, between 0 and 1; rounded to at least 1 document, and at
                least 1 is left.
            seed: Decides which; at least 0.

        Raises:
            InputError: There are fewer than 2 documents, or an argument is out of range.
        """
        if not 0 < fraction < 1:
            raise InputError(f"held-out fraction ({fraction}) must be between 0 and 1")
        if seed < 0:
            raise InputError(f"held-out seed ({seed}) must be at least 0")
        if self.num_documents < 2:
            raise InputError(
                f"{self.name} has {self.num_documents} document; holding some out needs at least 2 "
                "(data.max_document_tokens cuts documents up)"
            )
        num_held_out = min(max(1, round(fraction * self.num_documents)), self.num_documents - 1)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(self.num_documents)
        return self.subset(np.sort(order[num_held_out:])), self.subset(np.sort(order[:num_held_out]))

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Return the corpus that `build_corpus` wrote into `folder`, after checking all of it.

        Every byte is read once for its checksum; the tokens then stay on disk and are mapped into memory.

        Raises:
            CheckpointError: A file is missing, damaged or of another format version.
        """
        manifest = _read_manifest(folder / MANIFEST_FILE)
        for name, size, checksum in (
            (TOKENS_FILE, manifest["num_tokens"] * np.dtype(manifest["dtype"]).itemsize, manifest["tokens_crc32"]),
            (DOCUMENTS_FILE, manifest["num_documents"] * 2 * DOCUMENTS_DTYPE.itemsize, manifest["documents_crc32"]),
        ):
            _check_file(folder / name, num_bytes=size, checksum=checksum)
        ends, document_bytes = np.fromfile(folder / DOCUMENTS_FILE, DOCUMENTS_DTYPE).reshape(2, -1).astype(np.int64)
        if ends[-1] != manifest["num_tokens"] or np.any(np.diff(ends, prepend=0) < 1):
            raise CheckpointError(f"{folder / DOCUMENTS_FILE} is damaged: document ends must grow up to num_tokens")
        # A plain view of the map: the subclass would only make every slice slower.
        tokens = np.asarray(np.memmap(folder / TOKENS_FILE, dtype=manifest["dtype"], mode="r"))
        return cls(
            name=f"corpus {manifest['name']}",
            tokens=tokens,
            starts=ends - np.diff(ends, prepend=0),
            ends=ends,
            document_bytes=document_bytes,
            vocab_size=manifest["vocab_size"],
        )


def corpus_from_arrays(
    arrays: Sequence[NDArray[Any]], vocab_size: int, document_bytes: Sequence[int] | None = None
) -> Corpus:
    """Return a corpus in memory.

    Args:
        arrays: Token ids of each document, 1-D integers.
        vocab_size: Number of different ids.
        document_bytes: Number of bytes of each document's original content. None counts one a token.

    Raises:
        InputError: There is no document, one is empty or has an id out of the vocabulary, or the counts disagree.
        InputTypeError: An array is not of integers.
    """
    dtype = smallest_dtype(vocab_size)
    if not arrays:
        raise InputError("a corpus needs at least one document")
    for index, array in enumerate(arrays):
        if array.ndim != 1 or not array.size:
            raise InputError(f"document {index} has shape {array.shape}; it must be 1-D with at least one token")
        check_ids(array, vocab_size=vocab_size, name=str(index))
    if document_bytes is not None and (len(document_bytes) != len(arrays) or min(document_bytes) < 1):
        raise InputError(
            f"document_bytes (of {len(document_bytes)} documents) must hold a count of at least 1 for each of "
            f"{len(arrays)} documents"
        )
    ends = np.cumsum([array.size for array in arrays], dtype=np.int64)
    lengths = np.diff(ends, prepend=0)
    return Corpus(
        name="corpus in memory",
        tokens=np.concatenate([array.astype(dtype) for array in arrays]),
        starts=ends - lengths,
        ends=ends,
        document_bytes=lengths if document_bytes is None else np.asarray(document_bytes, dtype=np.int64),
        vocab_size=vocab_size,
    )


def check_ids(ids: NDArray[Any], *, vocab_size: int, name: str) -> None:
    """Refuse what are not token ids.

    Raises:
        InputError: An id is out of the vocabulary.
        InputTypeError: They are not integers.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputTypeError(f"document {name} has dtype {ids.dtype}; token ids must be integers")
    for extreme in (ids.min(), ids.max()):
        if not 0 <= extreme < vocab_size:
            raise InputError(f"document {name} has token id {extreme}; it must be from 0 to {vocab_size - 1}")


def serialize_manifest(manifest: dict[str, Any]) -> bytes:
    """Return the one way in which a manifest is written, with a checksum of itself."""
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
    # Compared as a whole, which also finds a changed blank.
    if serialize_manifest(manifest) != raw:
        raise CheckpointError(f"{path} is damaged: its checksum does not match; delete the folder to build it again")
    return manifest


def _check_file(path: Path, *, num_bytes: int, checksum: int) -> None:
    actual_checksum = 0
    try:
        actual_bytes = path.stat().st_size
        if actual_bytes != num_bytes:
            raise CheckpointError(
                f"{path} has {actual_bytes} bytes; {MANIFEST_FILE} promises {num_bytes}; delete the folder to build "
                "it again"
            )
        with path.open("rb") as file:
            while block := file.read(_CHECKSUM_BLOCK_BYTES):
                actual_checksum = zlib.crc32(block, actual_checksum)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if actual_checksum != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum does not match; delete the folder to build it again")
