"""What a memory is worth on plain documents: by the position in the document, and by the age of what it remembers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.data import Corpus, LaneStream
from memformer.errors import InputError
from memformer.evaluation.likelihood import check_vocabulary
from memformer.models.recurrence import RecurrentModel, in_evaluation_mode
from memformer.rollout import Rollout
from memformer.utils.machine import peak_memory_bytes

DEFAULT_DELAYS = (0, 1, 2, 4, 8, 16, 32)

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """The segments of all documents that stand at neighbouring positions.

    Attributes:
        first_segment: Least position in the document; a document's first segment has position 0.
        last_segment: Greatest position.
        num_tokens: Tokens predicted.
        nats: Their summed negative log-likelihood with the memory.
        nats_memory_erased: The same with the memory erased before every segment.
    """

    first_segment: int
    last_segment: int
    num_tokens: int
    nats: float
    nats_memory_erased: float

    @property
    def bits_per_token(self) -> float:
        """Bits per token with the memory."""
        return self.nats / self.num_tokens / math.log(2)

    @property
    def bits_per_token_memory_erased(self) -> float:
        """Bits per token with the memory erased."""
        return self.nats_memory_erased / self.num_tokens / math.log(2)

    @property
    def label(self) -> str:
        """The positions, as one number or from-to."""
        return f"{self.first_segment}" + (f"-{self.last_segment}" if self.last_segment > self.first_segment else "")

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures as JSON values."""
        return {
            "first_segment": self.first_segment,
            "last_segment": self.last_segment,
            "num_tokens": self.num_tokens,
            "bits_per_token": self.bits_per_token,
            "bits_per_token_memory_erased": self.bits_per_token_memory_erased,
        }


@dataclass(frozen=True, kw_only=True)
class DocumentRetention:
    """What the memory is worth by position, and what old memory is worth.

    The likelihoods by delay are all over the same tokens: those that have at least as many segments of their document
    before them as the longest delay.

    Attributes:
        num_documents: Documents read.
        num_tokens: Their tokens.
        num_bytes: Their bytes before tokenization (pixels, for images).
        segment_length: Tokens of a segment.
        buckets: From the documents' beginning on; their tokens are all tokens.
        num_delayed_tokens: Tokens that the likelihoods by delay are over.
        delayed_nats: Summed negative log-likelihood by delay, 0 first. With delay d a segment is read with the memory
            that its document had d segments earlier: what came since is not in it.
        delayed_nats_memory_erased: The same with the memory erased before every segment.
        peak_memory_bytes: The most memory held: of the device for CUDA, else of this process.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    segment_length: int
    buckets: list[PositionBucket]
    num_delayed_tokens: int
    delayed_nats: dict[int, float]
    delayed_nats_memory_erased: float
    peak_memory_bytes: int

    def bits_per_byte(self, delay: int | None) -> float:
        """Return the bits per byte with the memory of `delay` segments earlier; None for an erased one.

        The bytes of some of a document's tokens are not known: they count as the mean over all tokens.
        """
        nats = self.delayed_nats_memory_erased if delay is None else self.delayed_nats[delay]
        return nats / self.num_delayed_tokens / math.log(2) * self.num_tokens / self.num_bytes

    def recent_gain(self, delay: int) -> float:
        """Return the bits per byte that the memory of the last `delay` segments saves."""
        return self.bits_per_byte(delay) - self.bits_per_byte(0)

    def older_gain(self, delay: int) -> float:
        """Return the bits per byte that the memory of what is older than `delay` segments saves on its own."""
        return self.bits_per_byte(None) - self.bits_per_byte(delay)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "segment_length": self.segment_length,
            "peak_memory_bytes": self.peak_memory_bytes,
            "positions": [bucket.to_dict() for bucket in self.buckets],
            "delays": {
                "num_tokens": self.num_delayed_tokens,
                "first_segment": max(self.delayed_nats),
                "bits_per_byte_memory_erased": self.bits_per_byte(None),
                "points": [
                    {
                        "delay": delay,
                        "bits_per_byte": self.bits_per_byte(delay),
                        "recent_gain_bits_per_byte": self.recent_gain(delay),
                        "older_gain_bits_per_byte": self.older_gain(delay),
                    }
                    for delay in self.delayed_nats
                ],
            },
        }

    def to_table(self) -> str:
        """Return the figures as two tables for a terminal."""
        rows = ["bits per token by position in the document (in segments)"]
        rows += [f"{'segments':>12}{'tokens':>12}{'with memory':>14}{'memory erased':>16}{'gain':>10}"]
        for bucket in self.buckets:
            bits, erased = bucket.bits_per_token, bucket.bits_per_token_memory_erased
            rows.append(f"{bucket.label:>12}{bucket.num_tokens:12,}{bits:14.4f}{erased:16.4f}{erased - bits:10.4f}")
        longest = max(self.delayed_nats)
        rows += ["", "bits per byte with the memory of some segments earlier, and what is saved by"]
        rows += [f"{'segments':>12}{'bits/byte':>12}{'memory since':>14}{'older memory':>16}"]
        rows += [
            f"{delay:12,}{self.bits_per_byte(delay):12.4f}{self.recent_gain(delay):14.4f}{self.older_gain(delay):16.4f}"
            for delay in self.delayed_nats
        ]
        rows += [
            f"{'erased':>12}{self.bits_per_byte(None):12.4f}{self.bits_per_byte(None) - self.bits_per_byte(0):14.4f}"
        ]
        rows += [
            f"all over the same {self.num_delayed_tokens:,} tokens, which have at least {longest} segments of "
            f"{self.segment_length} tokens before them",
            f"{self.num_documents:,} held-out documents of {self.num_tokens:,} tokens; peak memory "
            f"{self.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
        return "\n".join(rows)


@torch.no_grad()
def measure_documents(
    model: RecurrentModel,
    corpus: Corpus,
    *,
    delays: Sequence[int] | None = None,
    num_lanes: int = 8,
    progress: Callable[[int], None] | None = None,
) -> DocumentRetention:
    """Return what the memory is worth by position and by age, all from one pass over the documents.

    The memory M_t that enters segment t of a document is carried as always. With delay d, segment t is read with
    M_(t-d) in its place; for every d, only segments count that have as many before them as the longest delay. Memory
    held does not grow with the documents: of each lane the memories of the last segments, as many as the longest delay.
    Summation is in float64; the model's mode is left as it was.

    Args:
        model: The model.
        corpus: Documents; their token ids must be in the model's vocabulary.
        delays: In segments; 0, the memory as it is, is always among them. None doubles up to 32, as far as there are
            documents of so many segments.
        num_lanes: Documents read side by side; it changes nothing.
        progress: Called with the number of segments read so far.

    Raises:
        InputError: A number is out of its range, the corpus has another vocabulary, no document is longer than the
            longest delay, or the model gives a likelihood that is not finite.
    """
    check_vocabulary(model, corpus)
    num_segments = -(-corpus.document_lengths // model.segment_length)
    longest_document = int(num_segments.max())
    if delays is None:
        delays = [delay for delay in DEFAULT_DELAYS if delay < longest_document]
    if any(delay < 0 for delay in delays):
        raise InputError(f"delays ({', '.join(map(str, delays))}) must be at least 0 segments each")
    delays = sorted({0, *delays})
    if delays[-1] >= longest_document:
        raise InputError(
            f"delays go up to {delays[-1]} segments of {model.segment_length} tokens, and the longest of the documents "
            f"has {longest_document}: nothing in them has so much before it"
        )
    num_lanes = min(num_lanes, corpus.num_documents)
    stream = LaneStream(
        corpus,
        num_lanes=num_lanes,
        segment_length=model.segment_length,
        rollout_length=max(1, _TOKENS_AT_ONCE // (num_lanes * model.segment_length * (1 + len(delays)))),
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    firsts = [0, *(1 << power for power in range((longest_document - 1).bit_length()))]
    totals = _Totals(firsts, longest_delay=delays[-1], num_memories=1 + len(delays), num_lanes=stream.num_lanes)
    with in_evaluation_mode(model):
        walk = _Walk(model, delays, num_lanes=stream.num_lanes)
        for rollout in stream:
            totals.add(rollout, walk.read(rollout))
            if progress is not None:
                progress(totals.num_segments)
    if not (np.isfinite(totals.nats).all() and np.isfinite(totals.delayed_nats).all()):
        raise InputError("the model's likelihood is not finite: its weights are broken")
    erased, *delayed = totals.delayed_nats.tolist()
    lasts = [first - 1 for first in firsts[1:]] + [2 * firsts[-1] - 1 if firsts[-1] else 0]
    return DocumentRetention(
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        num_bytes=corpus.num_bytes,
        segment_length=model.segment_length,
        buckets=[
            PositionBucket(
                first_segment=first, last_segment=last, num_tokens=count, nats=nats[1], nats_memory_erased=nats[0]
            )
            for first, last, count, nats in zip(
                firsts, lasts, totals.num_tokens.tolist(), totals.nats.T.tolist(), strict=True
            )
        ],
        num_delayed_tokens=totals.num_delayed_tokens,
        delayed_nats=dict(zip(delays, delayed, strict=True)),
        delayed_nats_memory_erased=erased,
        peak_memory_bytes=peak_memory_bytes(model.device),
    )


class _Walk:
    """Lanes of documents, each segment read with several memories: the initial one, then that of each delay.

    Args:
        model: The model.
        delays: In segments, ascending, 0 first.
        num_lanes: Rows B.
    """

    def __init__(self, model: RecurrentModel, delays: Sequence[int], *, num_lanes: int) -> None:
        self._model = model
        self._delays = delays
        self._initial = model.initial_memory(num_lanes)
        self._memory = self._initial.clone()
        # A ring of the memories that entered the last segments of the lanes. Where a lane began another document since,
        # they are those of the one before; nothing counts there.
        self._past = torch.stack([self._initial] * (delays[-1] + 1))
        self._timestep = 0

    def read(self, rollout: Rollout) -> NDArray[np.float64]:
        """Return the nats of each segment with each memory, (N, memories, B); 0 where a lane has no document."""
        nats = np.zeros((rollout.num_timesteps, 1 + len(self._delays), rollout.batch_size))
        rows = np.arange(rollout.batch_size)
        if rollout.target_padding is not None:
            rows = rows[~rollout.target_padding.all(dim=-1).all(dim=0).numpy()]
        own = self._model.arrange(rollout.select_rows(rows).to(self._model.device))
        nats[..., rows] = self._read_rows(own, rows)
        return nats

    def _read_rows(self, rollout: Rollout, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the nats of the lanes `rows`, which are the rows of the rollout."""
        assert rollout.reset is not None
        present, memories = [], []
        for timestep, segment in enumerate(rollout.inputs):
            memory = self._model.reset_memory(self._memory[rows], rollout.reset[timestep])
            self._past[self._timestep % len(self._past), rows] = memory
            past = [self._past[(self._timestep - delay) % len(self._past), rows] for delay in self._delays[1:]]
            memories.append(torch.stack([self._initial[rows], *past]))
            padding = None if rollout.input_padding is None else rollout.input_padding[timestep]
            hidden, self._memory[rows] = self._model.encode(segment, memory=memory, padding_mask=padding)
            present.append(hidden)
            self._timestep += 1
        # What is read with another memory leads nowhere: no timestep waits for another, so one batch reads them all.
        count = len(self._delays)
        hidden, _ = self._model.encode(
            _repeat(rollout.inputs, count),
            memory=torch.stack(memories).flatten(0, 2),
            padding_mask=None if rollout.input_padding is None else _repeat(rollout.input_padding, count),
        )
        others = hidden.unflatten(0, (-1, count, len(rows)))
        # The initial memory, then that of delay 0, then those of the others.
        hidden = torch.cat([others[:, :1], torch.stack(present)[:, None], others[:, 1:]], dim=1).flatten(0, 2)
        nats = self._model.token_nats(
            _repeat(rollout.targets, 1 + count),
            hidden=hidden,
            hidden_padding_mask=None if rollout.input_padding is None else _repeat(rollout.input_padding, 1 + count),
            target_padding_mask=None if rollout.target_padding is None else _repeat(rollout.target_padding, 1 + count),
        )
        return nats.double().sum(dim=-1).view(-1, 1 + count, len(rows)).cpu().numpy()


def _repeat(tokens: Tensor, count: int) -> Tensor:
    """Return (N * count * B, S) of (N, B, S): each timestep's rows so many times."""
    return tokens[:, None].expand(-1, count, -1, -1).flatten(0, 2)


class _Totals:
    """Sums over all documents.

    Args:
        firsts: The least position of each bucket.
        longest_delay: In segments; nearer to the beginning of a document nothing counts for the delays.
        num_memories: Memories that each segment is read with: the initial one, that of delay 0, and others.
        num_lanes: Rows B.
    """

    def __init__(self, firsts: Sequence[int], *, longest_delay: int, num_memories: int, num_lanes: int) -> None:
        self._firsts = np.array(firsts)
        self._longest_delay = longest_delay
        self._position = np.zeros(num_lanes, np.int64)
        self.nats = np.zeros((2, len(firsts)))  # with the memory erased, and with it
        self.num_tokens = np.zeros(len(firsts), np.int64)
        self.delayed_nats = np.zeros(num_memories)
        self.num_delayed_tokens = 0
        self.num_segments = 0

    def add(self, rollout: Rollout, nats: NDArray[np.float64]) -> None:
        """Add the segments of a rollout, of which `nats` (N, memories, B) are the nats."""
        assert rollout.reset is not None
        shape = rollout.targets.shape
        is_target = np.ones(shape, np.bool_) if rollout.target_padding is None else ~rollout.target_padding.numpy()
        for reset, num_tokens, nats_here in zip(rollout.reset.numpy(), is_target.sum(axis=-1), nats, strict=True):
            self._position = np.where(reset, 0, self._position + 1)
            occupied = num_tokens > 0  # a lane without a document reads nothing
            bucket = np.searchsorted(self._firsts, self._position[occupied], side="right") - 1
            np.add.at(self.num_tokens, bucket, num_tokens[occupied])
            np.add.at(self.nats.T, bucket, nats_here[:2, occupied].T)
            counts = occupied & (self._position >= self._longest_delay)
            self.num_delayed_tokens += int(num_tokens[counts].sum())
            self.delayed_nats += nats_here[:, counts].sum(axis=-1)
            self.num_segments += int(occupied.sum())
