"""Data sets of the Hugging Face hub, and folders that the `datasets` package reads or has written."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from memformer.data.documents import Document
from memformer.data.text import split_documents, text_of
from memformer.errors import InputError
from memformer.utils.files import user_path

# The files by which `datasets.load_from_disk` knows a folder that `save_to_disk` wrote: of one split, or of several.
_SAVED_SPLIT = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
_HUB_NAME = re.compile(r"[\w.-]*\w(/[\w.-]*\w)?", re.ASCII)


def local_folder(name: str) -> Path | None:
    """Return the folder that the name of a data set means, or None for a data set of the hub.

    Raises:
        InputError: It is a file, or neither a folder nor such a name.
    """
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(f"name ({name}) is a file; kind 'huggingface' reads a folder of such files")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"name ({name}) is no folder, and no name of a data set on the hub (owner/name)")
    return None


def newest_revision(name: str) -> str:
    """Return the commit of a data set that the hub has now, as 40 hexadecimal digits.

    Raises:
        InputError: The hub cannot be reached, or has no such data set.
    """
    try:
        from huggingface_hub import HfApi  # slow to import

        revision = HfApi().dataset_info(name, timeout=30).sha
    # The package's own message best explains a failure.
    except Exception as error:
        raise InputError(
            f"the newest version of data set {name!r} cannot be looked up on the hub: {error} "
            "(without a network, give the commit to read as revision)"
        ) from error
    return str(revision)


def read_data_set(
    name: str,
    *,
    config_name: str | None,
    revision: str | None,
    split: str,
    text_key: str,
    document_start: str | None = None,
) -> Iterator[Document]:
    """Yield the documents of a data set, one per record or split where a record matches.

    Args:
        name: Name of the data set on the hub, which is streamed, or a folder: of data files, or from `save_to_disk`.
        config_name: Configuration of the data set, if it has several.
        revision: Commit of the data set on the hub. None: the newest.
        split: Split to read, for example `train`.
        text_key: Column that contains the text.
        document_start: A regular expression; a record that matches it as a whole begins a document. Records are then
            treated as lines, and a missing line ending is added. None: one document per record.

    Raises:
        InputError: The `datasets` package is missing, it could not load the data set, or a record has no text under
            `text_key`.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise InputError("kind 'huggingface' needs the extra: pip install 'memformer-lm[datasets]'") from error
    folder = local_folder(name)
    explained = partial(_failures_explained, f"data set {name!r} (config_name {config_name!r}, split {split!r})")
    with explained():
        if folder is not None and any((folder / file).is_file() for file in (_SAVED_SPLIT, _SAVED_SPLITS)):
            records = _saved_split(datasets.load_from_disk(str(folder)), name, config_name=config_name, split=split)
        else:
            records = datasets.load_dataset(
                name if folder is None else str(folder), config_name, split=split, revision=revision, streaming=True
            )
    named = ((f"{name}:{index}", record) for index, record in enumerate(_each(records, explained)))
    texts = ((place, text_of(record, text_key=text_key, name=place)) for place, record in named)
    if document_start is None:
        yield from (Document(place, text) for place, text in texts)
    else:
        lines = ((place, text if text.endswith(b"\n") else text + b"\n") for place, text in texts)
        yield from split_documents(lines, document_start)


@contextmanager
def _failures_explained(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    # The package's own message best explains a failure (no network, no such split, a damaged file).
    except Exception as error:
        raise InputError(f"{what} cannot be loaded: {error}") from error


def _each(
    records: Iterable[Mapping[str, Any]], explained: Callable[[], AbstractContextManager[None]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the records; a data set is streamed, so failures may come with any of them."""
    iterator = iter(records)
    while True:
        with explained():
            record = next(iterator, None)
        if record is None:
            return
        yield record


def _saved_split(saved: Any, name: str, *, config_name: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    """Return the records of a split that `save_to_disk` wrote.

    Raises:
        InputError: The folder has no such split, or a configuration is given.
    """
    if config_name is not None:
        raise InputError(f"config_name ({config_name!r}) is not read from {name}, which save_to_disk wrote")
    # A data set that was saved by itself may have no record of its split; the package calls such a one train.
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise InputError(f"split ({split!r}) must be one of {', '.join(splits)}, the splits that {name} holds")
    records: Iterable[Mapping[str, Any]] = splits[split]
    return records
