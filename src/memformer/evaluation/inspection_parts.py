"""Parts of an inspection: samples of timesteps, the history of slots, the best passages, lifetimes of values."""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memformer.evaluation.half_life import LifetimeProbe, computed_half_lives, forgetting_norms, time_of_half
from memformer.evaluation.inspection_results import KINDS, InspectedTimestep, Passage, Slot, SlotRead, Write, kind_of
from memformer.evaluation.streams import TokenTexts
from memformer.models.memformer import Memformer
from memformer.models.recurrence import RecurrentModel
from memformer.nn.attention import AttentionRecord

# The memory holds little of a document before this timestep.
_FIRST_PROBE = 4
_SLOTS_OF_PASSAGE = 3
_CONTEXT_TOKENS = 48
_TOKENS_BEFORE_WRITE = 12
_TOKENS_AFTER_WRITE = 4


class Sampler:
    """Keeps the timesteps of a window, or evenly spaced ones of a stream of unknown length.

    Without a window every timestep is kept until there are more than `most`; then every second one is dropped, from
    then on every second one is kept, and so on. So the first timestep is always kept, and more than half of `most` are
    kept of a longer stream.

    Args:
        window: First timestep, and the timestep after the last one. None: sample.
        most: Largest number of samples.
    """

    def __init__(self, window: tuple[int, int] | None, most: int) -> None:
        self._window = window
        self._most = most
        self._distance = 1
        self.timesteps: list[InspectedTimestep] = []

    def wants(self, index: int) -> bool:
        """Return whether the timestep of this index is to be kept."""
        if self._window is not None:
            return self._window[0] <= index < self._window[1]
        return index % self._distance == 0

    def add(self, timestep: InspectedTimestep) -> None:
        """Keep a timestep."""
        self.timesteps.append(timestep)
        while self._window is None and len(self.timesteps) > self._most:
            self._distance *= 2
            self.timesteps = [kept for kept in self.timesteps if self.wants(kept.index)]

    def describe(self, num_timesteps: int) -> str:
        """Return a sentence that says which of the stream's timesteps are kept."""
        if len(self.timesteps) == num_timesteps:
            return f"All {num_timesteps:,} timesteps are kept in full."
        if self._window is not None:
            first, end = self._window[0], min(self._window[1], num_timesteps)
            if first >= end:
                return (
                    f"No timestep is kept in full: the window begins at timestep {first:,}, and the stream has "
                    f"{num_timesteps:,}; sums, slots and passages cover all of them."
                )
            return (
                f"Timesteps {first:,} to {end - 1:,} of the stream's {num_timesteps:,} are kept in full "
                f"({len(self.timesteps):,} timesteps); sums, slots and passages cover all of them."
            )
        return (
            f"One in {self._distance:,} of the stream's {num_timesteps:,} timesteps is kept in full "
            f"({len(self.timesteps):,} timesteps); sums, slots and passages cover all of them."
        )


class _Mark(NamedTuple):
    """A write without its text; `ids` are the tokens that were read, `before` those of the timestep before."""

    document: int
    timestep: int
    token: int
    weight: float
    ids: list[int]
    before: list[int]


class SlotHistory:
    """Writes and kept shares of each slot so far.

    Args:
        num_slots: Number of slots K.
        texts: Texts of token ids.
    """

    def __init__(self, num_slots: int, texts: TokenTexts) -> None:
        self._texts = texts
        self._counts = np.zeros((num_slots, len(KINDS)), np.int64)
        self._counts_of_heads = np.zeros(len(KINDS), np.int64)
        self._sums = np.zeros((2, num_slots))  # of the weights for itself, and of the kept shares
        # Last write of each slot in the current document, and in the stream.
        self._last: list[_Mark | None] = [None] * num_slots
        self._last_of_stream = list(self._last)

    def begin_document(self) -> None:
        """Forget the writes of the previous document, whose memory is gone."""
        self._last = [None] * len(self._last)

    def add(
        self,
        document: int,
        timestep: int,
        ids: list[int],
        *,
        before: list[int],
        kept: NDArray[np.float64],
        writer: NDArray[np.float64],
        own_of_heads: NDArray[np.float64],
    ) -> None:
        """Add a timestep that read the tokens `ids`.

        Args:
            document: Number of the document.
            timestep: Timestep in the document.
            ids: Token ids that were read.
            before: Token ids that were read before them, which may hold the beginning of a character.
            kept: Kept share of each slot, (K,).
            writer: Weights of each slot for itself and the tokens, averaged over heads, (K, 1 + S).
            own_of_heads: Weight of each slot for itself in each head, (H, K).
        """
        kinds = kind_of(writer[:, 0])
        self._counts[np.arange(len(kinds)), kinds] += 1
        self._counts_of_heads += np.bincount(kind_of(own_of_heads).flatten(), minlength=len(KINDS))
        self._sums += writer[:, 0], kept
        tokens = writer[:, 1:].argmax(axis=1)
        written = np.flatnonzero(kinds != 0)
        for slot, token in zip(written.tolist(), tokens[written].tolist(), strict=True):
            mark = _Mark(document, timestep, token, float(writer[slot, 1 + token]), ids, before)
            self._last[slot] = self._last_of_stream[slot] = mark

    def last_write(self, slot: int) -> Write | None:
        """Return the last write of a slot in the current document."""
        return self._write_of(self._last[slot])

    def _write_of(self, mark: "_Mark | None") -> Write | None:
        """Return a write with its text, which takes too long to make for every write."""
        if mark is None:
            return None
        document, timestep, token, weight, ids, before = mark
        start, end = max(0, token - _TOKENS_BEFORE_WRITE), token + 1 + _TOKENS_AFTER_WRITE
        text = self._texts.joined(ids[start:end], before=[*before, *ids[:start]])
        return Write(document=document, timestep=timestep, token=token, weight=weight, text=text)

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps that were added."""
        return int(self._counts[0].sum())

    def kind_shares(self) -> dict[str, float]:
        """Return the share of each kind over all slots and timesteps."""
        return _shares(self._counts.sum(axis=0))

    def kind_shares_of_heads(self) -> dict[str, float]:
        """Return the same with every head of a slot taken for itself."""
        return _shares(self._counts_of_heads)

    def slots(self, model: RecurrentModel, lifetimes: "Lifetimes") -> list[Slot]:
        """Return the summary of each slot."""
        norms: list[float | None] = [None] * len(self._last)
        half_lives = norms
        if isinstance(model, Memformer):
            norms, half_lives = forgetting_norms(model).tolist(), computed_half_lives(model).tolist()
        totals = np.maximum(1, self._counts.sum(axis=1))
        shares = self._counts / totals[:, None]
        own, kept = (self._sums / totals).tolist()
        slots = []
        for slot, kind in enumerate(self._counts.argmax(axis=1).tolist()):
            measured, at_least, left, num_probes = lifetimes.of(slot)
            slots.append(
                Slot(
                    slot=slot,
                    kind=KINDS[kind],
                    kind_shares=dict(zip(KINDS, shares[slot].tolist(), strict=True)),
                    mean_own_weight=own[slot],
                    mean_kept=kept[slot],
                    forgetting_norm=norms[slot],
                    half_life=half_lives[slot],
                    half_life_measured=measured,
                    half_life_at_least=at_least,
                    share_left=left,
                    num_probes=num_probes,
                    last_write=self._write_of(self._last_of_stream[slot]),
                )
            )
        return slots


def _shares(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return the share of each kind in the number of its occurrences."""
    return dict(zip(KINDS, (counts / max(1, counts.sum())).tolist(), strict=True))


# Smallest gain of a passage as a share of its surprisal. In a document's first segment the two are equal but for
# rounding, which depends on the processor.
_LEAST_GAIN = 1e-5


class PassageList:
    """The passages in which the memory saved most so far.

    Args:
        most: Largest number of passages.
        num_tokens: Tokens of a passage.
        texts: Texts of token ids.
    """

    def __init__(self, most: int, num_tokens: int, texts: TokenTexts) -> None:
        self._most = most
        self._num_tokens = num_tokens
        self._texts = texts
        # A heap with the smallest gain first; of equal gains, the later passage is dropped.
        self._heap: list[tuple[float, int, int, Passage]] = []

    def add(
        self,
        *,
        place: tuple[int, int, int],
        ids: list[int],
        before: list[int],
        nll: NDArray[np.float64],
        read: NDArray[np.float64],
        last_write: Callable[[int], Write | None],
    ) -> None:
        """Add the passages of one timestep.

        Args:
            place: The timestep's index in the stream, its document, and its timestep there.
            ids: Token ids that were predicted.
            before: Token ids before them.
            nll: Their surprisal with memory and with it erased, (2, tokens).
            read: Mean weight of each slot when the memory was read, (K,).
            last_write: Returns the last write of a slot before the timestep.
        """
        for start in range(0, len(ids), self._num_tokens) if self._most else ():
            part = slice(start, start + self._num_tokens)
            intact, erased = nll[:, part].sum(axis=1).tolist()
            gain = erased - intact
            if gain <= _LEAST_GAIN * intact or (len(self._heap) == self._most and gain <= self._heap[0][0]):
                continue
            earlier = [*before, *ids[:start]]
            slots = np.argsort(-read, kind="stable")[:_SLOTS_OF_PASSAGE].tolist()
            passage = Passage(
                index=place[0],
                document=place[1],
                timestep=place[2],
                first_token=start,
                token_ids=ids[part],
                context=self._texts.joined(earlier[-_CONTEXT_TOKENS:], before=earlier[:-_CONTEXT_TOKENS]),
                text=self._texts.joined(ids[part], before=earlier),
                nll=intact,
                nll_erased=erased,
                slots=[SlotRead(slot=slot, weight=float(read[slot]), last_write=last_write(slot)) for slot in slots],
            )
            heapq.heappush(self._heap, (gain, -place[0], -start, passage))
            if len(self._heap) > self._most:
                heapq.heappop(self._heap)

    def best(self) -> list[Passage]:
        """Return the passages, the best first."""
        return [entry[3] for entry in sorted(self._heap, key=lambda entry: entry[:3], reverse=True)]


class Lifetimes:
    """Probes that measure half-lives, one after another.

    A probe starts at timestep 4 of a document or later, when the previous probe has ended and the stream has twice as
    many timesteps as then. It ends after `probe_timesteps` timesteps or with the document.

    Args:
        model: The model.
        num_probes: Largest number of probes.
        probe_timesteps: Largest number of timesteps of a probe.
        max_slots: Largest number of slots to measure.
    """

    def __init__(self, model: RecurrentModel, *, num_probes: int, probe_timesteps: int, max_slots: int) -> None:
        self._model = model
        self._num_probes = num_probes
        self._probe_timesteps = probe_timesteps
        num_slots = model.memory_shape[0]
        self.slots = np.unique(np.linspace(0, num_slots - 1, min(num_slots, max_slots)).round().astype(np.int64))
        self.num_started = 0
        self._probe: LifetimeProbe | None = None
        self._found: list[NDArray[np.float64]] = []
        self._num_timesteps = 0
        self._next_start = 0

    def read(
        self,
        segment: Tensor,
        padding: Tensor | None,
        *,
        memory: Tensor,
        next_memory: Tensor,
        record: AttentionRecord,
        timestep: int,
    ) -> None:
        """Read a segment with which the memory changes to `next_memory`; `timestep` counts in the document."""
        if self._probe is not None and (timestep == 0 or self._probe.num_timesteps == self._probe_timesteps):
            self._finish()
        can_start = self._probe is None and self.num_started < self._num_probes
        if can_start and timestep >= _FIRST_PROBE and self._num_timesteps >= self._next_start:
            self.num_started += 1
            self._probe = LifetimeProbe(self._model, memory, self.slots)
        if self._probe is not None:
            self._probe.read(segment, padding, next_memory=next_memory, record=record)
        self._num_timesteps += 1

    def _finish(self) -> None:
        assert self._probe is not None
        self._found.append(self._probe.shares())
        self._probe = None
        self._next_start = 2 * self._num_timesteps

    def of(self, slot: int) -> tuple[float | None, float | None, float | None, int]:
        """Return a slot's median half-life, a lower bound of it, the mean share left, and the number of probes.

        The half-life is None if the slot was not measured, or if half of its value was left in most probes; in the
        latter case there is a lower bound.
        """
        if self._probe is not None:
            self._finish()
        if slot not in self.slots:
            return None, None, None, 0
        column = int(np.searchsorted(self.slots, slot))
        shares = [found[:, column] for found in self._found if not np.isnan(found[:, column]).any()]
        if not shares:
            return None, None, None, 0
        times = np.array([time_of_half(share) for share in shares])
        left = float(np.mean([share[-1] for share in shares]))
        bounded = np.minimum(times, [len(share) - 1 for share in shares])
        if np.isfinite(median := float(np.median(times))):
            return median, None, left, len(shares)
        return None, float(np.median(bounded)), left, len(shares)
