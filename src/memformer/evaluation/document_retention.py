"""Memory gain on plain documents, by position in the document and by the age of the memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memformer.data import Corpus, LaneStream
from memformer.errors import InputError
from memformer.evaluation.likelihood import check_vocabulary
from memformer.evaluation.stability import Stability, measure_stability
from memformer.models.recurrence import RecurrentModel, reading, unwrapped
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, Integers, check_integer, check_integers, check_likelihood
from memformer.utils.machine import peak_memory_bytes
from memformer.utils.tables import format_table
from memformer.utils.words import counted

DEFAULT_DELAYS = (0, 1, 2, 4, 8, 16, 32)

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """Likelihood of the segments of all documents in a range of positions.

    Attributes:
        first_segment: Smallest position in the document; a document's first segment has position 0.
        last_segment: Largest position.
        num_tokens: Number of predicted tokens.
        nll: Their summed negative log-likelihood with the memory, in nats.
        nll_memory_erased: The same with the memory erased before every segment.
    """

    first_segment: int
    last_segment: int
    num_tokens: int
    nll: float
    nll_memory_erased: float

    @property
    def bits_per_token(self) -> float:
        """Bits per token with the memory."""
        return self.nll / self.num_tokens / math.log(2)

    @property
    def bits_per_token_memory_erased(self) -> float:
        """Bits per token with the memory erased."""
        return self.nll_memory_erased / self.num_tokens / math.log(2)

    @property
    def label(self) -> str:
        """The positions as text: one number, or first-last."""
        return f"{self.first_segment}" + (f"-{self.last_segment}" if self.last_segment > self.first_segment else "")

    def to_dict(self) -> dict[str, float | int]:
        """Return the metrics as JSON values."""
        return {
            "first_segment": self.first_segment,
            "last_segment": self.last_segment,
            "num_tokens": self.num_tokens,
            "bits_per_token": self.bits_per_token,
            "bits_per_token_memory_erased": self.bits_per_token_memory_erased,
        }


@dataclass(frozen=True, kw_only=True)
class DocumentRetention:
    """Memory gain by position in the document, and by the age of the memory.

    The likelihoods by delay all cover the same tokens: those of segments with at least as many earlier segments in
    their document as the longest delay.

    Attributes:
        num_documents: Number of documents.
        num_tokens: Number of tokens of all documents.
        num_bytes: Size of all documents in bytes, before tokenization (pixels, for images).
        segment_length: Tokens of a segment.
        buckets: Likelihoods in ascending order of position; together they cover all tokens.
        num_delayed_tokens: Number of tokens that the likelihoods by delay cover.
        delayed_nll: Summed negative log-likelihood in nats by delay, 0 first. With delay d, a segment is read with the
            memory that entered the segment d positions earlier, so nothing written since then is in it.
        delayed_nll_memory_erased: The same with the memory erased before every segment.
        peak_memory_bytes: Peak memory: of the device for CUDA, otherwise of this process.
        unit: Unit of the documents' size in texts: "byte", "pixel" for images, or "value" for series.
        stability: How a small difference in the memory grows or fades; None where it cannot be measured.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    segment_length: int
    buckets: list[PositionBucket]
    num_delayed_tokens: int
    delayed_nll: dict[int, float]
    delayed_nll_memory_erased: float
    peak_memory_bytes: int
    unit: str = "byte"
    stability: Stability | None = None

    def bits_per_byte(self, delay: int | None) -> float:
        """Return the bits per byte with the memory of `delay` segments earlier; None: with the memory erased.

        The number of bytes of some of a document's tokens is unknown; the mean over all tokens is used instead.
        """
        nll = self.delayed_nll_memory_erased if delay is None else self.delayed_nll[delay]
        return nll / self.num_delayed_tokens / math.log(2) * self.num_tokens / self.num_bytes

    def recent_gain(self, delay: int) -> float:
        """Return the bits per byte that the memory of the last `delay` segments saves."""
        return self.bits_per_byte(delay) - self.bits_per_byte(0)

    def older_gain(self, delay: int) -> float:
        """Return the bits per byte that the memory of segments older than `delay` saves on its own."""
        return self.bits_per_byte(None) - self.bits_per_byte(delay)

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as JSON values."""
        return {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "unit": self.unit,
            "segment_length": self.segment_length,
            "peak_memory_bytes": self.peak_memory_bytes,
            "stability": None if self.stability is None else self.stability.to_dict(),
            "positions": [bucket.to_dict() for bucket in self.buckets],
            "delays": {
                "num_tokens": self.num_delayed_tokens,
                "first_segment": max(self.delayed_nll),
                "bits_per_byte_memory_erased": self.bits_per_byte(None),
                "points": [
                    {
                        "delay": delay,
                        "bits_per_byte": self.bits_per_byte(delay),
                        "recent_gain_bits_per_byte": self.recent_gain(delay),
                        "older_gain_bits_per_byte": self.older_gain(delay),
                    }
                    for delay in self.delayed_nll
                ],
            },
        }

    def to_table(self) -> str:
        """Return the metrics as two tables for a terminal."""
        by_position = format_table(
            ("segments", "tokens", "with memory", "memory erased", "memory gain"),
            [
                (
                    bucket.label,
                    f"{bucket.num_tokens:,}",
                    f"{bucket.bits_per_token:.4f}",
                    f"{bucket.bits_per_token_memory_erased:.4f}",
                    f"{bucket.bits_per_token_memory_erased - bucket.bits_per_token:.4f}",
                )
                for bucket in self.buckets
            ],
        )
        erased = self.bits_per_byte(None)
        by_delay = format_table(
            ("delay", f"bits/{self.unit}", "gain of newer memory", "gain of older memory"),
            [
                *(
                    (
                        f"{delay:,}",
                        f"{self.bits_per_byte(delay):.4f}",
                        f"{self.recent_gain(delay):.4f}",
                        f"{self.older_gain(delay):.4f}",
                    )
                    for delay in self.delayed_nll
                ),
                ("erased", f"{erased:.4f}", f"{erased - self.bits_per_byte(0):.4f}", ""),
            ],
        )
        return "\n".join(
            (
                "bits per token by position in the document (in segments)",
                by_position,
                "",
                f"bits per {self.unit} with the memory of an earlier segment (delay in segments)",
                by_delay,
                f"computed over the same {self.num_delayed_tokens:,} tokens, which have at least "
                f"{counted(max(self.delayed_nll), 'segment')} of {self.segment_length} tokens before them",
                *(() if self.stability is None else (self.stability.to_line(),)),
                f"{counted(self.num_documents, 'held-out document')} of {self.num_tokens:,} tokens; peak memory "
                f"{self.peak_memory_bytes / 2**20:,.0f} MiB",
            )
        )


def measure_documents(
    model: nn.Module,
    corpus: Corpus,
    *,
    delays: Integers | None = None,
    num_lanes: Integer = 8,
    unit: str = "byte",
    progress: Callable[[int], None] | None = None,
) -> DocumentRetention:
    """Return the memory gain by position and by the age of the memory, from one pass over the documents.

    The memory M_t that enters segment t of a document is carried as usual. With delay d, segment t is read with M_(t-d)
    instead. For every d, only segments with at least as many earlier segments as the longest delay count. Memory use
    does not grow with the documents: each lane keeps the memories of its last segments, as many as the longest delay.
    Sums are in float64, and the model's mode is left unchanged.

    Args:
        model: The model.
        corpus: Documents; their token ids must be in the model's vocabulary.
        delays: Delays in segments; 0, the current memory, is always added. None: 0 and the powers of 2 up to 32 that
            are less than the number of segments of the longest document.
        num_lanes: Number of documents read side by side; it does not change the result.
        unit: Unit of the documents' size: "byte", "pixel" or "value" (`content_unit`).
        progress: Called with the number of segments read so far.

    Raises:
        InputError: A number is out of range, the corpus has another vocabulary size, no document is longer than the
            longest delay, or the model's likelihood is not finite.
    """
    model = unwrapped(model)
    check_vocabulary(model, corpus)
    num_segments = -(-corpus.document_lengths // model.segment_length)
    longest_document = int(num_segments.max())
    if delays is None:
        delays = [delay for delay in DEFAULT_DELAYS if delay < longest_document]
    delays = sorted({0, *check_integers("delays", delays, 0)})
    if delays[-1] >= longest_document:
        raise InputError(
            f"the longest delay ({delays[-1]} segments of {model.segment_length} tokens) must be less than the length "
            f"of the longest document ({longest_document} segments)"
        )
    num_lanes = min(check_integer("num_lanes", num_lanes, 1), corpus.num_documents)
    stream = LaneStream(
        corpus,
        num_lanes=num_lanes,
        segment_length=model.segment_length,
        rollout_length=max(1, _TOKENS_AT_ONCE // (num_lanes * model.segment_length * (1 + len(delays)))),
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    firsts = [0, *(1 << power for power in range((longest_document - 1).bit_length()))]
    with reading(model):
        totals = _Totals(firsts, longest_delay=delays[-1], num_memories=1 + len(delays), num_lanes=stream.num_lanes)
        reader = _DelayedReader(model, delays, num_lanes=stream.num_lanes)
        for rollout in stream:
            totals.add(rollout, reader.read(rollout))
            if progress is not None:
                progress(totals.num_segments)
    check_likelihood(totals.nll, totals.delayed_nll)
    erased, *delayed = totals.delayed_nll.tolist()
    lasts = [first - 1 for first in firsts[1:]] + [longest_document - 1]
    return DocumentRetention(
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        num_bytes=corpus.num_bytes,
        segment_length=model.segment_length,
        buckets=[
            PositionBucket(
                first_segment=first, last_segment=last, num_tokens=count, nll=nll[1], nll_memory_erased=nll[0]
            )
            for first, last, count, nll in zip(
                firsts, lasts, totals.num_tokens.tolist(), totals.nll.T.tolist(), strict=True
            )
        ],
        num_delayed_tokens=totals.num_delayed_tokens,
        delayed_nll=dict(zip(delays, delayed, strict=True)),
        delayed_nll_memory_erased=erased,
        peak_memory_bytes=peak_memory_bytes(model.device),
        unit=unit,
        stability=measure_stability(model, corpus, num_lanes=num_lanes),
    )


class _DelayedReader:
    """A reader of lanes that reads each segment with several memories: the initial one, then that of each delay.

    Args:
        model: The model.
        delays: In segments, ascending, 0 first.
        num_lanes: Number of rows B.
    """

    def __init__(self, model: RecurrentModel, delays: Sequence[int], *, num_lanes: int) -> None:
        self._model = model
        self._delays = delays
        self._initial = model.initial_memory(num_lanes)
        self._memory = self._initial.clone()
        # Ring buffer of the memories that entered the last segments of each lane. After a lane begins another document,
        # some of them belong to the previous one; segments that would read those are not counted.
        self._past = torch.stack([self._initial] * (delays[-1] + 1))
        self._timestep = 0

    def read(self, rollout: Rollout) -> NDArray[np.float64]:
        """Return the negative log-likelihood in nats of each segment with each memory, (N, memories, B).

        It is 0 where a lane has no document.
        """
        nll = np.zeros((rollout.num_timesteps, 1 + len(self._delays), rollout.batch_size))
        rows = np.arange(rollout.batch_size)
        if rollout.target_padding is not None:
            rows = rows[~rollout.target_padding.all(dim=-1).all(dim=0).numpy()]
        occupied = self._model.align_inputs(rollout.select_rows(rows).to(self._model.device))
        nll[..., rows] = self._read_rows(occupied, rows)
        return nll

    def _read_rows(self, rollout: Rollout, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the negative log-likelihood in nats of the lanes `rows`, which are the rows of the rollout."""
        assert rollout.reset is not None
        current, memories = [], []
        for timestep, segment in enumerate(rollout.inputs):
            memory = self._model.reset_memory(self._memory[rows], rollout.reset[timestep])
            self._past[self._timestep % len(self._past), rows] = memory
            past = [self._past[(self._timestep - delay) % len(self._past), rows] for delay in self._delays[1:]]
            memories.append(torch.stack([self._initial[rows], *past]))
            padding = None if rollout.input_padding is None else rollout.input_padding[timestep]
            hidden, self._memory[rows] = self._model.encode(segment, memory=memory, padding_mask=padding)
            current.append(hidden)
            self._timestep += 1
        # With the other memories nothing is carried to the next timestep, so one batch reads all timesteps.
        count = len(self._delays)
        hidden, _ = self._model.encode(
            _repeat(rollout.inputs, count),
            memory=torch.stack(memories).flatten(0, 2),
            padding_mask=None if rollout.input_padding is None else _repeat(rollout.input_padding, count),
        )
        others = hidden.unflatten(0, (-1, count, len(rows)))
        # The initial memory, then the memory of delay 0, then the memories of the other delays.
        hidden = torch.cat([others[:, :1], torch.stack(current)[:, None], others[:, 1:]], dim=1).flatten(0, 2)
        nll = self._model.token_nll(
            _repeat(rollout.targets, 1 + count),
            hidden=hidden,
            hidden_padding_mask=None if rollout.input_padding is None else _repeat(rollout.input_padding, 1 + count),
            target_padding_mask=None if rollout.target_padding is None else _repeat(rollout.target_padding, 1 + count),
        )
        return nll.double().sum(dim=-1).view(-1, 1 + count, len(rows)).cpu().numpy()


def _repeat(tokens: Tensor, count: int) -> Tensor:
    """Return (N, B, S) as (N * count * B, S), with each timestep's rows repeated `count` times."""
    return tokens[:, None].expand(-1, count, -1, -1).flatten(0, 2)


class _Totals:
    """Sums over all documents, by position and by delay.

    Args:
        firsts: Smallest position of each bucket.
        longest_delay: In segments; segments closer to the beginning of their document are excluded from the sums by
            delay.
        num_memories: Number of memories for each segment: the initial one and one for each delay.
        num_lanes: Number of rows B.
    """

    def __init__(self, firsts: Sequence[int], *, longest_delay: int, num_memories: int, num_lanes: int) -> None:
        self._firsts = np.array(firsts)
        self._longest_delay = longest_delay
        self._position = np.zeros(num_lanes, np.int64)
        self.nll = np.zeros((2, len(firsts)))  # with the memory erased, and with it
        self.num_tokens = np.zeros(len(firsts), np.int64)
        self.delayed_nll = np.zeros(num_memories)
        self.num_delayed_tokens = 0
        self.num_segments = 0

    def add(self, rollout: Rollout, nll: NDArray[np.float64]) -> None:
        """Add the segments of a rollout, whose negative log-likelihoods in nats are `nll` (N, memories, B)."""
        assert rollout.reset is not None
        shape = rollout.targets.shape
        is_target = np.ones(shape, np.bool_) if rollout.target_padding is None else ~rollout.target_padding.numpy()
        for reset, num_tokens, nll_here in zip(rollout.reset.numpy(), is_target.sum(axis=-1), nll, strict=True):
            self._position = np.where(reset, 0, self._position + 1)
            occupied = num_tokens > 0  # a lane without a document reads nothing
            bucket = np.searchsorted(self._firsts, self._position[occupied], side="right") - 1
            np.add.at(self.num_tokens, bucket, num_tokens[occupied])
            np.add.at(self.nll.T, bucket, nll_here[:2, occupied].T)
            counts = occupied & (self._position >= self._longest_delay)
            self.num_delayed_tokens += int(num_tokens[counts].sum())
            self.delayed_nll += nll_here[:, counts].sum(axis=-1)
            self.num_segments += int(occupied.sum())
