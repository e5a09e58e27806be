"""Small corpora of distinct tokens, and streams over them as plain lists."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from memformer.data import Corpus, LaneStream, corpus_from_arrays

BOS = 99


def make_corpus(*lengths: int) -> Corpus:
    """Return a corpus of distinct tokens that are never 0, so that any misplaced token is noticed."""
    ends = np.cumsum(lengths)
    return corpus_from_arrays([np.arange(e - n, e) + 1 + 1000 for e, n in zip(ends, lengths, strict=True)], 10**6)


def stream_of(corpus: Corpus, lanes: int = 2, segment: int = 4, rollout: int = 3, **options) -> LaneStream:
    return LaneStream(
        corpus, num_lanes=lanes, segment_length=segment, rollout_length=rollout, bos_token_id=BOS, **options
    )


def one_lane(model, corpus: Corpus, rollout_length: int = 3) -> LaneStream:
    """Return a stream that reads the documents of a corpus once, one after another."""
    return LaneStream(
        corpus,
        num_lanes=1,
        segment_length=model.segment_length,
        rollout_length=rollout_length,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )


def padding_of(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool) if mask is None else mask


def timesteps(stream: LaneStream, limit: int | None = None) -> list[tuple]:
    """Return every timestep as plain lists, independent of the rollout length."""
    rows = []
    for rollout, documents in islice(iter(stream.next_with_documents, None), limit):
        read, predicted = (
            padding_of(rollout.input_padding, rollout.inputs),
            padding_of(rollout.target_padding, rollout.targets),
        )
        for n in range(rollout.num_timesteps):
            parts = rollout.inputs[n], read[n], rollout.targets[n], predicted[n], rollout.reset[n], documents[n]
            rows.append(tuple(part.tolist() for part in parts))
    return rows
