"""Tiny models of every type and option, and padded rows for them."""

from functools import partial

import torch

from memformer import Rollout, Session, hf
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline

# Every option of the Memformer, and every baseline.
MODELS = {
    **{name: partial(tiny_model, **fields) for name, fields in VARIANTS.items()},
    "special tokens": partial(tiny_model, num_special_tokens=2),
    **{name: partial(tiny_baseline, name) for name in BASELINES},
}
# One of each kind, where the subject does not depend on the options.
KINDS = ["default", "separate attention", "lstm, adaptive softmax", "compressive, uneven"]
BOS = VOCAB_SIZE
# Rows end at different places of a segment.
LENGTHS = (14, 8, 3)


def make_hf(name="default", **changes):
    model = hf.as_causal_lm(MODELS[name](**changes))
    return model.train(changes.get("dropout", 0) > 0)


def texts(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def placed(rows, columns, *, width, filler=BOS):
    """Return ids and mask of rows whose tokens stand in the given columns; the rest is filler."""
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros_like(ids)
    for row, (tokens, where) in enumerate(zip(rows, columns, strict=True)):
        ids[row, where] = tokens
        mask[row, where] = 1
    return ids, mask


def left_padded(rows, **options):
    width = max(map(len, rows)) + 2
    return placed(rows, [torch.arange(width - len(row), width) for row in rows], width=width, **options)


def right_padded(rows, **options):
    return placed(rows, [torch.arange(len(row)) for row in rows], width=max(map(len, rows)) + 2, **options)


def scattered(rows, **options):
    """Put padding before, between and after the tokens."""
    width = max(map(len, rows)) + 5
    generator = torch.Generator().manual_seed(9)
    columns = [torch.randperm(width, generator=generator)[: len(row)].sort().values for row in rows]
    return placed(rows, columns, width=width, **options)


def session_logits(model, rows):
    """Return for each row the logits (T + 1, V) before and after each token, from a session of the library."""
    session = Session(model, batch_size=len(rows))
    predicted = session.token_logits([row.tolist() for row in rows])
    return [
        torch.cat([logits, last[None]]) for logits, last in zip(predicted, session.next_token_logits(), strict=True)
    ]


def rollout_of(tokens):
    """Return the rollout of one unpadded row per text, all of the same whole number of segments."""
    segments = tokens.view(len(tokens), -1, SEGMENT_LENGTH).transpose(0, 1)
    first = torch.zeros_like(segments[:1])
    first[..., 0] = BOS
    padding = torch.zeros(segments.shape, dtype=torch.bool)
    padding[0, :, 1:] = True
    return Rollout(inputs=torch.cat([first, segments[:-1]]), targets=segments, input_padding=padding)
