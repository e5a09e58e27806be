"""How well a model predicts documents, and what its memory is worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memformer.data import Corpus, LaneStream
from memformer.errors import InputError
from memformer.models.recurrence import RecurrentModel, in_evaluation_mode
from memformer.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The likelihood of a set of documents.

    Attributes:
        nats: Summed negative log-likelihood.
        num_tokens: Tokens predicted.
        num_bytes: Bytes of the documents before tokenization (pixels, for images).
    """

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.nats / self.num_tokens, 700.0))

    @property
    def bits_per_token(self) -> float:
        """Bits per token."""
        return self.nats / self.num_tokens / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the original documents (per pixel, for images)."""
        return self.nats / self.num_bytes / math.log(2)

    def to_dict(self) -> dict[str, float]:
        """Return the figures as JSON values."""
        return {
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


class Result(ABC):
    """What an evaluation found, however it measured."""

    @property
    @abstractmethod
    def score(self) -> float:
        """One number to compare weights by; the lower the better."""

    @abstractmethod
    def to_log(self) -> dict[str, float]:
        """Return what the run's log holds of it."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""

    @abstractmethod
    def to_line(self) -> str:
        """Return the figures as one line."""

    @abstractmethod
    def to_table(self) -> str:
        """Return the figures as a table for a terminal."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """A likelihood with the memory, and beside it with the memory erased before every segment.

    Attributes:
        with_memory: As the model is meant to be used.
        memory_erased: The memory is the initial memory at every segment; the previous segment is still seen.
    """

    with_memory: Likelihood
    memory_erased: Likelihood

    @property
    def memory_gain(self) -> float:
        """Bits per byte that the carried memory saves; negative if it does harm."""
        return self.memory_erased.bits_per_byte - self.with_memory.bits_per_byte

    @property
    def score(self) -> float:
        """Bits per byte with the memory."""
        return self.with_memory.bits_per_byte

    def to_log(self) -> dict[str, float]:
        """Return what the run's log holds of it."""
        return {**self.with_memory.to_dict(), "bits_per_byte_memory_erased": self.memory_erased.bits_per_byte}

    def to_line(self) -> str:
        """Return the figures as one line."""
        return (
            f"held out {self.with_memory.bits_per_byte:.4f} bits/byte, "
            f"memory erased {self.memory_erased.bits_per_byte:.4f}"
        )

    def to_table(self) -> str:
        """Return the figures as a table for a terminal."""
        rows = [("", "bits/byte", "bits/token", "perplexity")]
        for label, figures in (("with memory", self.with_memory), ("memory erased", self.memory_erased)):
            rows.append(
                (label, f"{figures.bits_per_byte:.4f}", f"{figures.bits_per_token:.4f}", f"{figures.perplexity:.4f}")
            )
        table = "\n".join(f"{row[0]:14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)
        return (
            f"{table}\nthe memory is worth {self.memory_gain:.4f} bits per byte "
            f"over {self.with_memory.num_tokens:,} held-out tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "num_tokens": self.with_memory.num_tokens,
            "num_bytes": self.with_memory.num_bytes,
            "with_memory": self.with_memory.to_dict(),
            "memory_erased": self.memory_erased.to_dict(),
            "memory_gain_bits_per_byte": self.memory_gain,
        }


@torch.no_grad()
def evaluate(
    model: RecurrentModel,
    corpus: Corpus,
    *,
    num_lanes: int = 8,
    rollout_length: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Return the likelihood of every token of every document, each exactly once, whatever the number of lanes.

    Evaluation has its own memory and leaves the model's mode as it was. Summation is in float64.

    Args:
        model: The model.
        corpus: Documents; their token ids must be in the model's vocabulary.
        num_lanes: Documents read side by side.
        rollout_length: Timesteps read out together.
        progress: Called with the number of tokens just done.

    Raises:
        InputError: The corpus has another vocabulary, or the model gives a likelihood that is not finite.
    """
    check_vocabulary(model, corpus)
    stream = LaneStream(
        corpus,
        num_lanes=min(num_lanes, corpus.num_documents),
        segment_length=model.segment_length,
        rollout_length=rollout_length,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    totals = torch.zeros(2, dtype=torch.float64)
    memory: Tensor | None = None
    with in_evaluation_mode(model):
        for cpu_rollout in stream:
            rollout = model.arrange(cpu_rollout.to(model.device))
            if memory is None:
                memory = model.initial_memory(rollout.batch_size)
            erased = _encode_erased(model, rollout)
            remembering, memory = encode_rollout(model, rollout, memory)
            for index, hidden in enumerate((remembering, erased)):
                totals[index] += rollout_nats(model, rollout, hidden).double().sum().cpu()
            if progress is not None:
                progress(cpu_rollout.count_target_tokens())
    if not totals.isfinite().all():
        raise InputError(f"the model's likelihood is {totals.tolist()} nats; it must be finite: its weights are broken")
    with_memory, memory_erased = (
        Likelihood(nats=nats, num_tokens=corpus.num_tokens, num_bytes=corpus.num_bytes) for nats in totals.tolist()
    )
    return Evaluation(with_memory=with_memory, memory_erased=memory_erased)


def check_vocabulary(model: RecurrentModel, corpus: Corpus) -> None:
    """Check that a corpus was made for a model's vocabulary.

    Raises:
        InputError: It was not.
    """
    if corpus.vocab_size != model.vocab_size:
        raise InputError(
            f"the corpus has a vocabulary of {corpus.vocab_size} tokens, the model one of {model.vocab_size}"
        )


def encode_rollout(model: RecurrentModel, rollout: Rollout, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states of all timesteps and rows, (N*B, S, D), and the memory that leaves."""
    hiddens = []
    for timestep, segment in enumerate(rollout.inputs):
        if rollout.reset is not None:
            memory = model.reset_memory(memory, rollout.reset[timestep])
        padding = None if rollout.input_padding is None else rollout.input_padding[timestep]
        hidden, memory = model.encode(segment, memory=memory, padding_mask=padding)
        hiddens.append(hidden)
    return torch.cat(hiddens), memory


def _encode_erased(model: RecurrentModel, rollout: Rollout) -> Tensor:
    """Return the hidden states (N*B, S, D) with the initial memory everywhere: no timestep waits for another."""
    segments = rollout.inputs.flatten(0, 1)
    memory = model.initial_memory(segments.shape[0])
    hidden, _ = model.encode(segments, memory=memory, padding_mask=_rows(rollout.input_padding))
    return hidden


def _rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten(0, 1)


def rollout_nats(model: RecurrentModel, rollout: Rollout, hidden: Tensor) -> Tensor:
    """Return the nats of every target, (N*B, T), from the hidden states of all timesteps and rows; 0 at padding."""
    return model.token_nats(
        rollout.targets.flatten(0, 1),
        hidden=hidden,
        hidden_padding_mask=_rows(rollout.input_padding),
        target_padding_mask=_rows(rollout.target_padding),
    )
