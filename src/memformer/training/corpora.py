"""From a data config to a tokenizer and the documents to train and evaluate on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memformer.data import (
    Corpus,
    PixelTokenizer,
    SourceConfig,
    Tokenizer,
    build_corpus,
    image_shape,
    iterate_documents,
    source_levels,
    train_tokenizer,
)
from memformer.errors import InputError
from memformer.training.config import DataConfig


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        tokenizer: Trained on the training documents, or given.
        train: Documents to train on.
        validation: Held-out documents.
    """

    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus


def prepare_data(
    config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: Callable[[int], None] | None = None
) -> RunData:
    """Return tokenizer and documents; token ids are built on disk at the first call and found there afterwards.

    Args:
        config: What to read.
        tokenizer: One that was trained before; None trains it here.
        progress: Called with the number of tokens just written.

    Raises:
        InputError: A source is missing, empty, undecodable, or too small to hold documents out.
        CheckpointError: Token ids on disk are damaged.
        SaveError: Token ids cannot be written.
    """
    if tokenizer is None:
        tokenizer = _make_tokenizer(config)
    train = open_corpus(config, config.train, tokenizer=tokenizer, progress=progress)
    if config.validation is None:
        train, validation = train.split(config.validation_fraction, config.seed)
    else:
        validation = open_corpus(config, config.validation, tokenizer=tokenizer, progress=progress)
    return RunData(tokenizer, train, validation)


def open_corpus(
    config: DataConfig,
    source: SourceConfig,
    *,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Return a source's documents as token ids.

    Raises:
        InputError: The source is missing, empty, undecodable, or its images have another shape than the tokenizer's.
        CheckpointError: Token ids on disk are damaged.
        SaveError: Token ids cannot be written.
    """
    shape = image_shape(source)
    is_image_tokenizer = isinstance(tokenizer, PixelTokenizer)
    if (shape is not None) != is_image_tokenizer:
        raise InputError(f"data of kind {source.kind!r} does not fit the run's tokenizer of kind {tokenizer.kind!r}")
    if isinstance(tokenizer, PixelTokenizer) and shape != (tokenizer.height, tokenizer.width):
        raise InputError(f"images of shape {shape} do not fit the run's {(tokenizer.height, tokenizer.width)}")
    cache = Path(config.cache) if config.cache is not None else default_cache()
    return build_corpus(
        source, tokenizer, cache=cache, max_document_tokens=config.max_document_tokens, progress=progress
    )


def default_cache() -> Path:
    """Return the folder for token ids that are built once and used by many runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memformer"


def _make_tokenizer(config: DataConfig) -> Tokenizer:
    shape, levels = image_shape(config.train), source_levels(config.train)
    if shape is not None and levels is not None:
        return PixelTokenizer(levels, *shape)
    documents = iterate_documents(config.train) if config.tokenizer.kind != "bytes" else iter(())
    return train_tokenizer(config.tokenizer, documents)
