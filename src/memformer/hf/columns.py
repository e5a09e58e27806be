"""Hidden states, logits and loss in the columns of padded rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.hf.rows import TokenRows, make_rollout
from memformer.models import LanguageModel, NextTokenModel
from memformer.rollout import Rollout
from memformer.utils.checks import check_integer

Columns = slice | Tensor
LAST_COLUMN = slice(-1, None)


def columns_to_keep(logits_to_keep: object, num_columns: int) -> Columns:
    """Return the columns that an argument of `forward` names: a number of last ones (0: all), or a tensor.

    Raises:
        InputError: The number is negative, or the tensor is not a list of columns or a mask of all of them.
        InputTypeError: It is neither an integer nor a tensor.
    """
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim > 0:
        if logits_to_keep.ndim > 1 or logits_to_keep.is_floating_point():
            kind = f"{tuple(logits_to_keep.shape)} of {logits_to_keep.dtype}"
            raise InputError(f"logits_to_keep has the shape {kind}; it must be a number, or a list of integers")
        if logits_to_keep.dtype == torch.bool:
            if len(logits_to_keep) != num_columns:
                found = len(logits_to_keep)
                raise InputError(f"logits_to_keep is a mask of {found} columns; input_ids have {num_columns}")
        elif any(not -num_columns <= column < num_columns for column in logits_to_keep.tolist()):
            raise InputError(f"logits_to_keep must be columns of input_ids, from 0 to {num_columns - 1}")
        return logits_to_keep
    return slice(-check_integer("logits_to_keep", logits_to_keep, 0) or None, None)


def column_logits(model: LanguageModel, rows: TokenRows, kept: Columns) -> Tensor:
    """Return the logits (B, columns, V) of the token after each kept column, with a graph if gradients are enabled.

    In a column of padding they are those of the token after the last token before it.
    """
    rollout = make_rollout(model, rows, num_after=1)
    hidden = _encode_all(model, rollout)
    places = rows.ranks[:, kept]
    # The readout of a timestep does not depend on others, so the timesteps before the first kept column are skipped.
    first = int(places.min()) // model.segment_length if places.numel() else 0
    padding = None if rollout.input_padding is None else rollout.input_padding[first:].flatten(0, 1)
    logits = model.decode(
        rollout.targets[first:].flatten(0, 1), hidden=torch.cat(hidden[first:]), hidden_padding_mask=padding
    )
    by_timestep = logits.unflatten(0, (-1, rollout.batch_size))
    return _take(by_timestep, places - first * model.segment_length)


def column_hidden_states(model: LanguageModel, rows: TokenRows) -> Tensor:
    """Return the hidden state (B, T, D) of the token in each column; at padding that of the last token before it."""
    length = model.segment_length
    if isinstance(model, NextTokenModel):
        # A place reads the token before it.
        rollout, places = make_rollout(model, rows, num_after=1), rows.ranks
    else:
        # A timestep reads the segment before it, and the first timestep `[BOS]`.
        rollout = make_rollout(model, rows, num_after=length)
        places = torch.where(rows.ranks > 0, rows.ranks + length - 1, 0)
    hidden = torch.stack(_encode_all(model, rollout))
    return _take(hidden[:, :, :length], places)


def stream_logits(session: Session, rows: TokenRows, kept: Columns) -> Tensor:
    """Let a session read the rows; return the logits (B, columns, V) of the token after each kept column."""
    tokens = rows.unpadded()
    if kept == LAST_COLUMN:
        session.feed(tokens)
        return session.next_token_logits()[:, None]
    predicted = session.token_logits(tokens)
    last = session.next_token_logits()
    of_rows = predicted if isinstance(predicted, list) else [predicted]
    by_place = [torch.cat([row.to(last.device), last[number, None]]) for number, row in enumerate(of_rows)]
    return _take(torch.nn.utils.rnn.pad_sequence(by_place)[:, :, None], rows.ranks[:, kept])


def _encode_all(model: LanguageModel, rollout: Rollout) -> list[Tensor]:
    """Return the hidden states of each timestep, read from the initial memory on."""
    memory, hidden = model.initial_memory(rollout.batch_size), []
    for timestep in range(rollout.num_timesteps):
        padding = None if rollout.input_padding is None else rollout.input_padding[timestep]
        states, memory = model.encode(rollout.inputs[timestep], memory=memory, padding_mask=padding)
        hidden.append(states)
    return hidden


def _take(values: Tensor, places: Tensor) -> Tensor:
    """Return the values at places (B, C) that are numbered over all timesteps of (N, B, L, W)."""
    by_place = values.transpose(0, 1).flatten(1, 2)
    return by_place.gather(1, places[..., None].expand(-1, -1, by_place.shape[-1]))


def with_all_ids(logits: Tensor, num_token_ids: int) -> Tensor:
    """Return logits with a column for every token id; those of ids that are never predicted have the lowest value."""
    missing = num_token_ids - logits.shape[-1]
    return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)


def causal_loss(logits: Tensor, input_ids: Tensor, counted: Tensor, *, num_items: Tensor | int | None) -> Tensor:
    """Return the summed negative log-likelihood of the tokens that count, in nats, over their number or `num_items`.

    Args:
        logits: (B, T, V), the logits of the token after each column.
        input_ids: (B, T), token ids.
        counted: (B, T) bool, True in columns that count; False in the first.
        num_items: Divisor. None: the number of columns that count. 0, if no column counts: the loss is 0.
    """
    is_target = counted[:, 1:]
    targets = input_ids.to(logits.device, torch.int64)[:, 1:][is_target]
    chosen = logits[:, :-1][is_target]
    nll = F.cross_entropy(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), targets, reduction="sum")
    return nll / at_least_one(targets.numel() if num_items is None else num_items)


def at_least_one(number: Tensor | int) -> Tensor | int:
    """Return the number, or 1 if it is 0: a batch of which no label counts has the loss 0."""
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
