"""Surprisal of each token of a document, with the memory and with the memory erased."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memformer.errors import InputError
from memformer.evaluation.inspection_streams import read_stream
from memformer.evaluation.likelihood import encode_erased
from memformer.models import LanguageModel
from memformer.models.recurrence import reading


def token_surprisal(
    model: LanguageModel, pieces: Iterable[NDArray[np.integer[Any]]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the negative log-likelihood of each token of one document in nats, with the memory and with it erased.

    The first is that of `Session.score`. With the memory erased, every segment is read with the initial memory, as in
    `evaluate`: the segment before it is still read. Apart from the result, memory use does not depend on the length.

    Args:
        model: The model that reads.
        pieces: The token ids of the document, arrays of one dimension and any length.

    Returns:
        Two arrays with a value for each token.

    Raises:
        InputError: A value is not finite, because the model's weights are broken.
    """
    found: list[NDArray[np.float64]] = [np.empty((2, 0))]
    with reading(model):
        memory = model.initial_memory(1)
        for rollout in read_stream(pieces, segment_length=model.segment_length, bos_token_id=model.bos_token_id):
            rollout = model.align_inputs(rollout).to(model.device)
            padding = None if rollout.input_padding is None else rollout.input_padding[:, 0]
            hiddens = []
            for index, segment in enumerate(rollout.inputs):
                mask = None if rollout.input_padding is None else rollout.input_padding[index]
                hidden, memory = model.encode(segment, memory=memory, padding_mask=mask)
                hiddens.append(hidden)
            (erased,) = encode_erased(model, rollout.inputs[:, 0], padding)
            targets = rollout.targets[:, 0]
            nll = [
                model.token_nll(targets, hidden=states, hidden_padding_mask=padding)
                for states in (torch.cat(hiddens), erased)
            ]
            counts = slice(None) if rollout.target_padding is None else ~rollout.target_padding[:, 0]
            found.append(torch.stack([values[counts].flatten() for values in nll]).double().cpu().numpy())
    with_memory, memory_erased = np.concatenate(found, axis=1)
    if not (np.isfinite(with_memory).all() and np.isfinite(memory_erased).all()):
        raise InputError("the negative log-likelihood is not finite: the model's weights are broken")
    return with_memory, memory_erased
