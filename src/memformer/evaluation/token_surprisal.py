"""Surprisal of each token of a document, with the memory and with the memory erased."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.evaluation.likelihood import encode_erased
from memformer.evaluation.streams import read_stream
from memformer.models import LanguageModel
from memformer.models.recurrence import RecurrentModel, reading
from memformer.rollout import Rollout
from memformer.utils.checks import check_likelihood


def token_surprisal(
    model: LanguageModel, pieces: Iterable[NDArray[np.integer[Any]]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the negative log-likelihood of each token of one document in nats, with the memory and with it erased.

    The first is that of `Session.score`. With the memory erased, every segment is read with the initial memory, as in
    `evaluate`: a decoder still reads the segment before it. Apart from the result, memory use does not depend on the
    length.

    Args:
        model: The model that reads.
        pieces: The token ids of the document, arrays of one dimension and any length.

    Returns:
        Two arrays with a value for each token.

    Raises:
        InputError: A value is not finite, because the model's weights or its memory are broken.
    """
    found: list[NDArray[np.float64]] = [np.empty((2, 0))]
    with reading(model):
        memory = model.initial_memory(1)
        for rollout in read_stream(pieces, segment_length=model.segment_length, bos_token_id=model.bos_token_id):
            rollout = model.align_inputs(rollout).to(model.device)
            hiddens = []
            for index, segment in enumerate(rollout.inputs):
                mask = None if rollout.input_padding is None else rollout.input_padding[index]
                hidden, memory = model.encode(segment, memory=memory, padding_mask=mask)
                hiddens.append(hidden)
            values = target_surprisal(model, rollout, torch.cat(hiddens))
            padding = rollout.target_padding
            found.append(values.reshape(2, -1) if padding is None else values[:, ~padding[:, 0].cpu().numpy()])
    with_memory, memory_erased = np.concatenate(found, axis=1)
    return with_memory, memory_erased


def target_surprisal(model: RecurrentModel, rollout: Rollout, hidden: Tensor) -> NDArray[np.float64]:
    """Return the surprisal of the targets of a rollout of one row in nats with memory and with it erased, (2, N, T).

    Args:
        model: The model.
        rollout: The rollout, on the model's device.
        hidden: (N, R, D), the hidden states of its timesteps with memory.

    Raises:
        InputError: A value is not finite, because the model's weights or its memory are broken.
    """
    padding = None if rollout.input_padding is None else rollout.input_padding[:, 0]
    target_padding = None if rollout.target_padding is None else rollout.target_padding[:, 0]
    (erased,) = encode_erased(model, rollout.inputs[:, 0], padding)
    nll = [
        model.token_nll(
            rollout.targets[:, 0], hidden=states, hidden_padding_mask=padding, target_padding_mask=target_padding
        )
        for states in (hidden, erased)
    ]
    found = torch.stack(nll).double().cpu().numpy()
    check_likelihood(found)
    return found
