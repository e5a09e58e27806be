"""The tokenizer of a new run, and the progress of reading its documents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from memformer.data import (
    PixelTokenizer,
    SourceConfig,
    Tokenizer,
    fit_bins,
    image_shape,
    iterate_documents,
    source_levels,
    train_tokenizer,
)
from memformer.data.document_end import DocumentEndTokenizer
from memformer.data.documents import Document
from memformer.data.recall.stream import task_text
from memformer.data.series import series_columns
from memformer.data.sources import iterate_blocks, locate_source_files, source_bytes
from memformer.data.streaming import whole_lines
from memformer.errors import InputError
from memformer.training.config import DataConfig
from memformer.utils.progress import ProgressBar


def make_tokenizer(config: DataConfig, *, shows_progress: bool) -> Tokenizer:
    """Return the tokenizer of a new run, learned from its training documents if its kind learns.

    Args:
        config: The data config.
        shows_progress: Whether to show the progress on stderr.

    Raises:
        InputError: The documents cannot be read, or do not fit the tokenizer; or all values of a series are the same.
    """
    shape, levels = image_shape(config.train), source_levels(config.train)
    if shape is not None and levels is not None:
        config.check_pieces(shape[0] * shape[1], "pixels of an image")
        return PixelTokenizer(levels, *shape)
    if config.train.kind == "array":
        columns = series_columns(locate_source_files(config.train), config.train.columns)
        config.check_pieces(len(columns), "columns, so that no row is cut")
        bins = fit_bins(
            iterate_documents(replace(config.train, columns=columns)),  # files may order their columns differently
            columns=columns,
            num_bins=config.tokenizer.num_bins,
            spacing=config.tokenizer.spacing,
        )
        if bins.vocab_size == 1:
            raise InputError("all values of the training data (data.train) are the same; there is nothing to predict")
        return bins
    is_learned = config.tokenizer.kind in {"bpe", "word"}
    documents = _text_parts(config.train) if is_learned else iter(())
    text = "" if config.recall is None else task_text(config.recall, config.tokenizer.kind)
    is_shown = shows_progress and is_learned
    try:
        with source_progress("learning the tokenizer", config.train, is_shown=is_shown) as progress:
            tokenizer = train_tokenizer(config.tokenizer, documents, text=text, progress=progress)
    except InputError as error:
        if config.tokenizer.path is None:
            raise
        raise InputError(f"data.tokenizer.path: {error}") from error
    return DocumentEndTokenizer(tokenizer) if config.end_of_document else tokenizer


def _text_parts(source: SourceConfig) -> Iterator[Document]:
    """Yield the texts of a source in whole lines, of which the same tokenizer is learned as of whole documents."""
    return (Document(name, part) for name, blocks in iterate_blocks(source) for part in whole_lines(blocks))


@contextmanager
def source_progress(label: str, source: SourceConfig, *, is_shown: bool) -> Iterator[Callable[[int], None] | None]:
    """Show the progress of reading a source.

    Yields:
        A function to call with the number of bytes read so far; None if nothing is shown.
    """
    if not is_shown:
        yield None
        return
    with ProgressBar(label, source_bytes(source), unit="byte") as bar:
        yield bar.advance_to
