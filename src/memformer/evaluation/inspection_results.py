"""Results of an inspection of the memory: timesteps, slots and passages, with their JSON values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from memformer.utils.tables import format_table
from memformer.utils.words import counted

Kind = Literal["holding", "aggregating", "fast turnover"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The thresholds are ours. The paper (arXiv 2010.06891v2, section 4.3.1) gives one example of a slot's weight for itself
# for each kind: 0.92, 0.34 and 0.07. Each threshold is between two of them.
HOLDING_FROM = 0.6
TURNOVER_BELOW = 0.2
PAPER_SHARES: dict[Kind, str] = {"holding": "60-80 %", "aggregating": "not given", "fast turnover": "5-10 %"}

Array = NDArray[np.floating[Any]]
_DECIMALS = 6


def rounded(array: Array) -> list[Any]:
    """Return an array as nested lists of numbers with 6 decimals."""
    values: list[Any] = array.astype(np.float64).round(_DECIMALS).tolist()
    return values


@dataclass(frozen=True, kw_only=True)
class InspectedTimestep:
    """One timestep of the stream. All weights are averages over heads (`AttentionRecord`).

    Attributes:
        index: Number of timesteps of the stream before this one.
        document: Number of the document in the stream, from 0.
        timestep: Timestep in the document; 0 reads `[BOS]`.
        read_ids: (S,) token ids that the encoder read.
        target_ids: (T,) token ids that were predicted.
        read_texts: Text of each token read. Empty without a tokenizer.
        target_texts: Text of each target. Empty without a tokenizer.
        kept: (K,) share of itself that each slot keeps, 0 to 1: its weight for itself times the share that forgetting
            leaves (`MemoryNormalization.share_left`; 1 without forgetting vectors).
        writer: (K, 1 + S) weights of the writer; each slot's weight for itself comes first.
        readers: (L, S, K) weights of the reader in each encoder layer.
        nll: (T,) surprisal of each target in nats.
        nll_erased: (T,) the same with the memory erased before the timestep.
    """

    index: int
    document: int
    timestep: int
    read_ids: list[int]
    target_ids: list[int]
    read_texts: list[str]
    target_texts: list[str]
    kept: Array
    writer: Array
    readers: Array
    nll: Array
    nll_erased: Array

    def to_dict(self, convert: Callable[[Array], Any] = rounded) -> dict[str, Any]:
        """Return all values as JSON values; `convert` converts the arrays of shares and weights."""
        return {
            "index": self.index,
            "document": self.document,
            "timestep": self.timestep,
            "read_ids": self.read_ids,
            "target_ids": self.target_ids,
            "read_texts": self.read_texts,
            "target_texts": self.target_texts,
            "kept": convert(self.kept),
            "writer": convert(self.writer),
            "readers": convert(self.readers),
            "nll": rounded(self.nll),
            "nll_erased": rounded(self.nll_erased),
        }


@dataclass(frozen=True, kw_only=True)
class Write:
    """The last time at which a slot took a substantial part of itself from tokens (it was not holding).

    Attributes:
        document: Number of the document.
        timestep: Timestep in the document.
        token: Index of the token with the largest weight in the segment that was read.
        weight: That token's weight.
        text: The token with some text before and after it. Empty without a tokenizer.
    """

    document: int
    timestep: int
    token: int
    weight: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values."""
        return {**vars(self), "weight": round(self.weight, _DECIMALS)}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Summary of one slot over the stream. Timesteps that read `[BOS]` are left out.

    Attributes:
        slot: Index of the slot.
        kind: The slot's most frequent kind.
        kind_shares: Share of the timesteps in which the slot was of each kind.
        mean_own_weight: Mean of its weight for itself.
        mean_kept: Mean of the share of itself that it keeps.
        forgetting_norm: ||v||, the length of its forgetting vector. None: the model has no such vectors.
        half_life: Timesteps until half of a value is forgotten if nothing is written; see `half_life`. None: the model
            has no forgetting vectors.
        half_life_measured: Median of the measured half-lives in timesteps. None: it was not measured, or the slot held
            nothing, or half of the value was not yet gone at the end of most probes.
        half_life_at_least: In the last of these cases a lower bound of the median, in timesteps. Otherwise None.
        share_left: Mean share of the value that was left at the end of the probes. None: not measured.
        num_probes: Number of probes of this slot.
        last_write: The last write, if any. Timesteps that read `[BOS]` are left out here too.
    """

    slot: int
    kind: Kind
    kind_shares: dict[str, float]
    mean_own_weight: float
    mean_kept: float
    forgetting_norm: float | None
    half_life: float | None
    half_life_measured: float | None
    half_life_at_least: float | None
    share_left: float | None
    num_probes: int
    last_write: Write | None

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values; an infinite half-life is "infinite"."""
        return {
            **vars(self),
            "half_life": "infinite" if self.half_life == math.inf else self.half_life,
            "last_write": None if self.last_write is None else self.last_write.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class SlotRead:
    """A slot that was read for a passage.

    Attributes:
        slot: Index of the slot.
        weight: Mean weight of the segment's tokens for it, over layers, heads and tokens.
        last_write: When it had last been written. None: never in this document, except from `[BOS]`.
    """

    slot: int
    weight: float
    last_write: Write | None

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values."""
        write = None if self.last_write is None else self.last_write.to_dict()
        return {"slot": self.slot, "weight": round(self.weight, _DECIMALS), "last_write": write}


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Consecutive tokens that the memory helped to predict.

    Attributes:
        index: Number of timesteps of the stream before the one that predicted the passage.
        document: Number of the document.
        timestep: Timestep in the document.
        first_token: Index of the passage's first token in the predicted segment.
        token_ids: Its token ids.
        context: Text before the passage. Empty without a tokenizer.
        text: Text of the passage. Empty without a tokenizer.
        nll: Surprisal of the passage in nats.
        nll_erased: The same with the memory erased.
        slots: The slots that were read most in this timestep, the most read first.
    """

    index: int
    document: int
    timestep: int
    first_token: int
    token_ids: list[int]
    context: str
    text: str
    nll: float
    nll_erased: float
    slots: list[SlotRead]

    @property
    def gain(self) -> float:
        """Nats that the memory saved."""
        return self.nll_erased - self.nll

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values."""
        return {**vars(self), "gain": self.gain, "slots": [slot.to_dict() for slot in self.slots]}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Results of an inspection: how a model's memory was used while it read a stream of documents.

    Attributes:
        num_documents: Number of documents.
        num_timesteps: Number of timesteps of all documents.
        num_tokens: Number of predicted tokens.
        segment_length: Tokens of a segment.
        nll: Summed surprisal of all tokens in nats.
        nll_erased: The same with the memory erased before every segment.
        kind_shares: Share of the slots of each kind, over all timesteps except those that read `[BOS]`.
        kind_shares_of_heads: The same without the average over heads: the share of the heads of slots of each kind. A
            slot whose heads do not agree, for example one that holds in one head and takes tokens in three, is of a
            kind in between.
        slots: Summary of each slot.
        timesteps: The timesteps of which everything was kept.
        selection: Sentence that says which timesteps these are.
        passages: The passages in which the memory saved most, the best first.
        max_passages: Largest number of passages.
        num_probes: Number of probes by which half-lives were measured.
        probe_timesteps: Largest number of timesteps of a probe.
        num_probed_slots: Number of slots whose half-life was measured.
        image_width: Pixels of a row, if the documents are images; otherwise None.
    """

    num_documents: int
    num_timesteps: int
    num_tokens: int
    segment_length: int
    nll: float
    nll_erased: float
    kind_shares: dict[str, float]
    kind_shares_of_heads: dict[str, float]
    slots: list[Slot]
    timesteps: list[InspectedTimestep]
    selection: str
    passages: list[Passage]
    max_passages: int
    num_probes: int
    probe_timesteps: int
    num_probed_slots: int
    image_width: int | None

    def to_dict(self, convert: Callable[[Array], Any] = rounded) -> dict[str, Any]:
        """Return all values as JSON values; `convert` converts the arrays of shares and weights."""
        return {
            **vars(self),
            "thresholds": {"holding_from": HOLDING_FROM, "turnover_below": TURNOVER_BELOW},
            "slots": [slot.to_dict() for slot in self.slots],
            "timesteps": [timestep.to_dict(convert) for timestep in self.timesteps],
            "passages": [passage.to_dict() for passage in self.passages],
        }

    def kind_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return for each kind: its name, limits, share of the slots, share of their heads, and share in the paper."""
        return [
            (
                kind,
                limits,
                f"{100 * self.kind_shares[kind]:.1f} %",
                f"{100 * self.kind_shares_of_heads[kind]:.1f} %",
                PAPER_SHARES[kind],
            )
            for kind, limits in zip(KINDS, kind_limits(), strict=True)
        ]

    def to_table(self) -> str:
        """Return the most important values as tables for a terminal."""
        scale = 1 / (max(1, self.num_tokens) * math.log(2))
        kinds = format_table(("kind of slot", "weight for itself", "share", "of heads", "paper"), self.kind_rows())
        erased, intact = self.nll_erased * scale, self.nll * scale
        return (
            f"{kinds}\n{self.num_tokens:,} tokens of {counted(self.num_documents, 'document')}: {intact:.4f} "
            f"bits/token with memory, {erased:.4f} with it erased, memory gain {erased - intact:.4f}\n{self.selection}"
        )


def kind_of(own_weights: Array) -> NDArray[np.int64]:
    """Return the index in `KINDS` of each slot's kind, from its weight for itself averaged over heads."""
    return np.where(own_weights >= HOLDING_FROM, 0, np.where(own_weights >= TURNOVER_BELOW, 1, 2))


def kind_limits() -> tuple[str, str, str]:
    """Return the range of a slot's weight for itself of each kind, as text."""
    return (
        f"at least {HOLDING_FROM}",
        f"{TURNOVER_BELOW} to {HOLDING_FROM}",
        f"below {TURNOVER_BELOW}",
    )
