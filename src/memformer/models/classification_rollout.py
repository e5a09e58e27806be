"""Rollouts of labelled documents."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memformer.errors import InputError, InputTypeError
from memformer.models.classification_config import MemformerClassificationConfig
from memformer.rollout import Rollout
from memformer.utils.checks import check_integer, shown
from memformer.utils.token_ids import TokenRow, check_token_ids, has_length


def label_rollout(
    documents: Sequence[TokenRow], labels: Sequence[Any], *, config: MemformerClassificationConfig
) -> Rollout:
    """Return a rollout with one document a row; see `MemformerForSequenceClassification.make_rollout`.

    Raises:
        InputError: As `make_rollout`.
        InputTypeError: As `make_rollout`.
    """
    for name, given in (("documents", documents), ("labels", labels)):
        if isinstance(given, Set | Mapping) or not has_length(given):
            raise InputTypeError(f"{name} ({shown(given)}) must be a list with one item for each document")
    if len(documents) != len(labels) or not len(documents):
        raise InputError(
            f"there are {len(documents)} documents and {len(labels)} items of labels; there must be as many, at least 1"
        )
    rows = [check_token_ids(document, vocab_size=config.vocab_size) for document in documents]
    if empty := [index for index, row in enumerate(rows) if not len(row)]:
        raise InputError(f"document {empty[0]} has no token; a label needs at least one")
    length = config.segment_length
    counts = [-(-len(row) // length) for row in rows]
    shape = (len(rows), max(counts))
    inputs, is_padding = np.zeros((*shape, length), np.int64), np.ones((*shape, length), bool)
    targets, has_no_label = np.zeros((*shape, 1), np.int64), np.ones((*shape, 1), bool)
    # By position: a pandas column looks its values up by the names of its rows.
    for index, (row, count, given) in enumerate(zip(rows, counts, labels, strict=True)):
        inputs[index].reshape(-1)[: len(row)] = row
        is_padding[index].reshape(-1)[: len(row)] = False
        labelled = slice(count - 1, count) if config.label_unit == "document" else slice(0, count)
        targets[index, labelled, 0] = _labels_of(given, index=index, count=count, config=config)
        has_no_label[index, labelled] = False
    return Rollout(
        inputs=_timesteps_first(inputs),
        targets=_timesteps_first(targets),
        input_padding=_timesteps_first(is_padding),
        target_padding=_timesteps_first(has_no_label),
    )


def _labels_of(given: Any, *, index: int, count: int, config: MemformerClassificationConfig) -> list[int]:
    """Return the labels of one document.

    Raises:
        InputError: As `make_rollout`.
        InputTypeError: As `make_rollout`.
    """
    name, largest = f"label of document {index}", config.num_labels - 1
    if config.label_unit == "document":
        return [check_integer(name, given, 0, largest)]
    if isinstance(given, str | bytes | Set | Mapping):
        raise InputTypeError(f"labels of document {index} ({shown(given)}) must be a list with one for each segment")
    if not has_length(given) or len(given) != count:
        found = f"{len(given)} labels" if has_length(given) else "one label"
        raise InputError(
            f"document {index} has {count} segments and {found}; with label_unit segment each segment has one label"
        )
    return [check_integer(name, label, 0, largest) for label in given]


def _timesteps_first(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array).transpose(0, 1).contiguous()
