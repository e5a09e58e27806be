"""Building of corpora: token ids on disk, cached by source and tokenizer."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.corpus import (
    DOCUMENTS_DTYPE,
    DOCUMENTS_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENS_FILE,
    Corpus,
    check_document,
    serialize_manifest,
)
from memformer.data.document_end import document_end_of
from memformer.data.documents import Document
from memformer.data.files import file_status
from memformer.data.sources import (
    SourceConfig,
    describe_source,
    iterate_blocks,
    locate_source_files,
    pin_revision,
)
from memformer.data.streaming import encode_blocks
from memformer.data.tokenizers import Tokenizer, smallest_dtype
from memformer.errors import InputError
from memformer.utils.checks import Integer, check_integer
from memformer.utils.files import saving, sync_folder, sync_handle, temporary_sibling, user_path, write_bytes


def build_corpus(
    source: SourceConfig,
    tokenizer: Tokenizer,
    *,
    cache: str | Path,
    max_document_tokens: Integer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Return the corpus of a source's documents, built on the first call and read from `cache` afterwards.

    The cache key covers the source, its files (resolved path, size, times of modification and change), the commit of a
    data set on the Hugging Face hub, the tokenizer and `max_document_tokens`; a change in any of them builds a new
    corpus. A corpus appears in `cache` complete or not at all, even if two processes build it at the same
    time. Documents without tokens are skipped. If the tokenizer has an end-of-document token, every document ends with
    it; no bytes are counted for it.

    Args:
        source: Source of the documents.
        tokenizer: Tokenizer that encodes them.
        cache: Folder of all corpora; created if missing.
        max_document_tokens: Longer documents are cut into pieces of this many tokens; the last piece may be shorter,
            and an end-of-document token is added to it. The document's bytes are divided among the pieces in
            proportion to their tokens and rounded so that the sum is exact; for bytes and pixels that is one byte per
            token. None: documents stay whole.
        progress: Called with the number of bytes (pixels, for images) of the documents encoded so far.

    Raises:
        InputError: The source cannot be read, no document has tokens, a token id is outside the tokenizer's
            vocabulary, or `max_document_tokens` is not positive.
        CheckpointError: A cached file is damaged.
        SaveError: The corpus could not be written.
    """
    if max_document_tokens is not None:
        max_document_tokens = check_integer("max_document_tokens", max_document_tokens, 1)
    source = pin_revision(source)
    cache = user_path(cache)
    folder = cache / _key(source, tokenizer, max_document_tokens)
    if not folder.exists():
        with saving(cache):
            cache.mkdir(parents=True, exist_ok=True)
        unfinished = temporary_sibling(folder)
        try:
            with saving(unfinished):
                unfinished.mkdir()
            _write(source, tokenizer, unfinished, max_document_tokens=max_document_tokens, progress=progress)
            _publish(unfinished, folder)
        finally:
            # Runs after an interrupt too, and in a process that published second.
            shutil.rmtree(unfinished, ignore_errors=True)
    return Corpus.open(folder)


def _key(source: SourceConfig, tokenizer: Tokenizer, max_document_tokens: int | None) -> str:
    identity = {
        "format_version": FORMAT_VERSION,
        "source": asdict(source),
        "files": [file_status(path) for path, _ in locate_source_files(source)],
        "tokenizer": tokenizer.fingerprint,
        "max_document_tokens": max_document_tokens,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        with saving(folder):
            unfinished.rename(folder)
    except InputError:
        # Another process published first; its corpus is identical.
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def _write(
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    max_document_tokens: int | None,
    progress: Callable[[int], None] | None,
) -> None:
    dtype = smallest_dtype(tokenizer.vocab_size)
    piece_tokens: list[int] = []
    piece_bytes: list[int] = []
    num_bytes_before = 0
    document_end = document_end_of(tokenizer)
    checksum = 0
    tokens_path = folder / TOKENS_FILE

    # Only writes are wrapped: an OSError raised while reading the source must not become a SaveError.
    def write(ids: NDArray[Any], checksum: int) -> int:
        content = ids.astype(dtype, copy=False).tobytes()
        with saving(tokens_path):
            tokens_file.write(content)
        return zlib.crc32(content, checksum)

    with saving(tokens_path):
        tokens_file = tokens_path.open("wb")
    with tokens_file:
        for name, blocks in iterate_blocks(source):
            num_tokens, num_bytes = 0, 0
            for ids, size in _encoded(name, blocks, tokenizer):
                checksum = write(ids, checksum)
                num_tokens, num_bytes = num_tokens + ids.size, num_bytes + size
                if progress is not None:
                    progress(num_bytes_before + num_bytes)
            num_bytes_before += num_bytes
            if not num_tokens:
                continue
            for length, size in _cut(num_tokens, num_bytes, max_document_tokens=max_document_tokens):
                piece_tokens.append(length)
                piece_bytes.append(size)
            if document_end is not None:
                checksum = write(np.array([document_end]), checksum)
                piece_tokens[-1] += 1
        with saving(tokens_path):
            tokens_file.flush()
            sync_handle(tokens_file.fileno())
    if not piece_tokens:
        raise InputError(f"source {describe_source(source)} holds no token: all its documents are empty")
    documents = np.stack([np.cumsum(piece_tokens), piece_bytes]).astype(DOCUMENTS_DTYPE).tobytes()
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": describe_source(source),
        "source": asdict(source),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "max_document_tokens": max_document_tokens,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "num_documents": len(piece_tokens),
        "num_tokens": sum(piece_tokens),
        "num_bytes": sum(piece_bytes),
        "tokens_crc32": checksum,
        "documents_crc32": zlib.crc32(documents),
    }
    write_bytes(folder / DOCUMENTS_FILE, documents)
    write_bytes(folder / MANIFEST_FILE, serialize_manifest(manifest))


def _encoded(name: str, blocks: Iterator[Any], tokenizer: Tokenizer) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield the token ids of a document in parts, and the number of bytes (pixels, values) of each part.

    A document of one block is one part, and so is any for a tokenizer that needs the whole text.
    """
    first, *others = islice(blocks, 2)
    if others:
        parts = encode_blocks(tokenizer, chain([first], others, blocks), name=name)
    else:
        parts = iter([(first, tokenizer.encode(first, name))] if len(first) else [])
    for content, ids in parts:
        check_document(ids, vocab_size=tokenizer.vocab_size, name=name)
        yield ids, Document(name, content).size


def _cut(num_tokens: int, num_bytes: int, *, max_document_tokens: int | None) -> Iterator[tuple[int, int]]:
    # Differences of cumulative sums, so that rounding never loses a byte.
    step = max_document_tokens or num_tokens
    for start in range(0, num_tokens, step):
        end = min(start + step, num_tokens)
        yield end - start, num_bytes * end // num_tokens - num_bytes * start // num_tokens
