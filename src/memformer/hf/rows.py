"""Rows of token ids with padding: where the tokens are, and the rollout that reads them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from memformer.errors import InputError, InputTypeError
from memformer.models import LanguageModel
from memformer.models.recurrence import IGNORED
from memformer.rollout import Rollout
from memformer.utils.checks import check_type


@dataclass(frozen=True)
class TokenRows:
    """The tokens of padded rows, moved to the front of each row.

    Attributes:
        tokens: (B, T) int64, the token ids of each row in order; 0 after the last.
        counts: (B,) int64, the number of tokens of each row.
        ranks: (B, T) int64, the number of tokens in each column and the columns before it.
        is_token: (B, T) bool, True in the columns that hold a token.
        order: (B, T) int64, the column that each entry of `tokens` comes from.
    """

    tokens: Tensor
    counts: Tensor
    ranks: Tensor
    is_token: Tensor
    order: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """Return the values (B, T) of the columns in the order of `tokens`."""
        return values.gather(1, self.order)

    def unpadded(self) -> Tensor | list[list[int]]:
        """Return the token ids of each row, as a session reads them."""
        rows = [row[:count] for row, count in zip(self.tokens, self.counts.tolist(), strict=True)]
        return rows[0] if len(rows) == 1 else [row.tolist() for row in rows]


def find_tokens(
    model: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    unread_ids: frozenset[int],
    num_past_columns: int = 0,
) -> TokenRows:
    """Return the tokens of padded rows; padding may be left, right and between the tokens.

    Args:
        model: The model that will read them.
        input_ids: (B, T), token ids, `[BOS]` and padding.
        attention_mask: (B, T), 0 at padding. None: no padding.
        unread_ids: Token ids outside the vocabulary that are never read: `[BOS]`, which the model adds by itself, and
            padding.
        num_past_columns: Number of columns that were read before; the mask may begin with them.

    Raises:
        InputError: A shape is wrong, the mask holds other values than 0 and 1, or an id is neither padding nor a token.
        InputTypeError: The ids are not integers.
    """
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise InputTypeError(f"input_ids have dtype {input_ids.dtype}; token ids must be integers")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(f"input_ids have shape {tuple(input_ids.shape)}; it must be (rows, columns), neither zero")
    ids = input_ids.to(model.device, torch.int64)
    is_known = (ids >= 0) & (ids < model.vocab_size)
    is_unread = ~_read_columns(ids, attention_mask, num_past_columns=num_past_columns)
    for unread in unread_ids:
        is_unread |= (ids == unread) & ~is_known
    if not (is_known | is_unread).all():
        wrong = ids[~(is_known | is_unread)][0]
        raise InputError(
            f"input_ids hold {int(wrong)}, which is neither padding nor a token; token ids are 0 to "
            f"{model.vocab_size - 1} and {', '.join(map(str, sorted(unread_ids)))}"
        )
    is_token = is_known & ~is_unread
    order = (~is_token).to(torch.uint8).argsort(dim=1, stable=True)
    counts, ranks = is_token.sum(dim=1), is_token.cumsum(dim=1)
    tokens = ids.masked_fill(~is_token, 0).gather(1, order)
    return TokenRows(tokens=tokens, counts=counts, ranks=ranks, is_token=is_token, order=order)


def _read_columns(ids: Tensor, attention_mask: Tensor | None, *, num_past_columns: int) -> Tensor:
    """Return True in the columns that an attention mask lets be read.

    Raises:
        InputError: The shape is wrong, or it holds other values than 0 and 1.
    """
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    shape, (rows, columns) = tuple(attention_mask.shape), ids.shape
    if shape not in {(rows, columns), (rows, num_past_columns + columns)}:
        raise InputError(
            f"attention_mask has shape {shape}; it must be (rows, columns) of input_ids, {(rows, columns)}"
            + (f", or have the {num_past_columns} that the cache has read in front" if num_past_columns else "")
        )
    mask = attention_mask[:, shape[1] - columns :].to(ids.device)
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError("attention_mask holds other values than 0 (padding) and 1 (token)")
    return mask != 0


def find_targets(rows: TokenRows, input_ids: Tensor, labels: Tensor, *, are_counted: bool) -> Tensor:
    """Return True (B, T) in the columns whose label counts.

    As for every causal model of transformers, labels are shifted inside: the label in column n is predicted from the
    columns before n, so the first column never counts. Padding and `[BOS]` are never predicted.

    Args:
        rows: The tokens of `input_ids`.
        input_ids: (B, T), token ids.
        labels: (B, T), the token ids again, or -100 where the loss does not count.
        are_counted: Whether the caller has counted the labels, as the Trainer does.

    Raises:
        InputError: The shape differs from that of `input_ids`, a label that counts is another token, or the caller has
            counted labels at padding or `[BOS]`.
        InputTypeError: The labels are not integers.
    """
    check_type("labels", labels, Tensor)
    if labels.shape != input_ids.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}; it must be that of input_ids, {tuple(input_ids.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels have dtype {str(labels.dtype).removeprefix('torch.')}; they must be integers")
    # Converted before the comparison: in uint8, -100 is 156.
    labels = labels.to(rows.tokens.device, torch.int64)
    given = labels != IGNORED
    given[:, 0] = False
    counted = given & rows.is_token
    if are_counted and (surplus := int((given & ~rows.is_token).sum())):
        raise InputError(
            f"{surplus} labels stand at padding or [BOS], which are not predicted, but num_items_in_batch counts them; "
            f"they must be {IGNORED} (as a data collator for language models makes them)"
        )
    differs = counted & (labels != input_ids.to(labels.device, torch.int64))
    if differs.any():
        row, column = differs.nonzero()[0].tolist()
        raise InputError(
            f"labels[{row}, {column}] is {int(labels[row, column])}, but input_ids hold {int(input_ids[row, column])} "
            f"there; a label is the token itself (it is shifted inside), or {IGNORED} if it does not count"
        )
    return counted


def make_rollout(model: LanguageModel, rows: TokenRows, *, num_after: int, is_target: Tensor | None = None) -> Rollout:
    """Return the rollout that reads rows from their first token on, in the model's format.

    The places of a row are numbered over all timesteps: place n has token n as its target.

    Args:
        model: The model.
        rows: The tokens.
        num_after: Number of places after the last token of each row.
        is_target: (B, T) bool, True in the columns that count. None: all places count.
    """
    length = model.segment_length
    num_places = rows.counts + num_after
    num_timesteps = max(-(-int(num_places.max()) // length), 1)
    places = torch.arange(num_timesteps * length, device=rows.tokens.device)
    targets = _in_segments(rows.tokens, num_timesteps, length)
    is_token = (places < rows.counts[:, None]).view(-1, num_timesteps, length).transpose(0, 1)
    is_place = (places < num_places[:, None]).view(-1, num_timesteps, length).transpose(0, 1)
    first = torch.zeros_like(targets[:1])
    first[..., 0] = model.bos_token_id
    rollout = Rollout(
        inputs=torch.cat([first, targets[:-1]]),
        targets=targets,
        input_padding=torch.cat([first != model.bos_token_id, ~is_token[:-1]]),
        target_padding=~is_place,
    )
    aligned = model.align_inputs(rollout)
    if is_target is None:
        return aligned
    return dataclasses.replace(aligned, target_padding=~_in_segments(rows.pick(is_target), num_timesteps, length))


def _in_segments(values: Tensor, num_timesteps: int, length: int) -> Tensor:
    """Return values (B, T) as (N, B, length), followed by zeros."""
    width = num_timesteps * length
    padded = torch.nn.functional.pad(values[:, :width], (0, max(width - values.shape[1], 0)))
    return padded.view(-1, num_timesteps, length).transpose(0, 1)
