"""Likelihood of documents under a model, and the memory gain."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memformer.data import BinTokenizer, Corpus, LaneStream, PixelTokenizer, Tokenizer
from memformer.errors import InputError
from memformer.evaluation.recorded_calls import RecordedCalls
from memformer.models.recurrence import RecurrentModel, reading, unwrapped
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, check_integer, check_likelihood, check_type
from memformer.utils.tables import format_table


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Likelihood of a set of documents.

    Attributes:
        nll: Summed negative log-likelihood, in nats.
        num_tokens: Number of predicted tokens.
        num_bytes: Size of the documents in bytes, before tokenization (pixels, for images).
    """

    nll: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token: exp(nll / num_tokens)."""
        return math.exp(min(self.nll / self.num_tokens, 700.0))

    @property
    def bits_per_token(self) -> float:
        """Bits per token."""
        return self.nll / self.num_tokens / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the original documents (per pixel, for images)."""
        return self.nll / self.num_bytes / math.log(2)

    def to_dict(self) -> dict[str, float]:
        """Return the metrics as JSON values."""
        return {
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


class Result(ABC):
    """Abstract result of an evaluation."""

    @property
    @abstractmethod
    def score(self) -> float:
        """Metric for comparing checkpoints; lower is better."""

    @abstractmethod
    def to_log(self) -> dict[str, float]:
        """Return the metrics for the run's log."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as JSON values."""

    @abstractmethod
    def to_line(self) -> str:
        """Return the metrics as one line of text."""

    @abstractmethod
    def to_table(self) -> str:
        """Return the metrics as a table for a terminal."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Likelihood with the memory intact, and with the memory erased before every segment.

    Attributes:
        with_memory: Likelihood with the memory carried from segment to segment.
        memory_erased: Likelihood with the initial memory at every segment. A decoder still reads the previous segment;
            a model without one, such as Transformer-XL, reads only its last token.
        unit: Unit of the documents' size in texts: "byte", "pixel" for images, or "value" for series.
    """

    with_memory: Likelihood
    memory_erased: Likelihood
    unit: str = "byte"

    @property
    def memory_gain(self) -> float:
        """Bits per byte that the carried memory saves (erased minus intact); negative if it does harm."""
        return self.memory_erased.bits_per_byte - self.with_memory.bits_per_byte

    @property
    def score(self) -> float:
        """Bits per byte with the memory."""
        return self.with_memory.bits_per_byte

    def to_log(self) -> dict[str, float]:
        """Return the metrics for the run's log."""
        return {**self.with_memory.to_dict(), "bits_per_byte_memory_erased": self.memory_erased.bits_per_byte}

    def to_line(self) -> str:
        """Return the metrics as one line of text."""
        return (
            f"held out {self.with_memory.bits_per_byte:.4f} bits/{self.unit}, "
            f"memory erased {self.memory_erased.bits_per_byte:.4f}"
        )

    def to_table(self) -> str:
        """Return the metrics as a table for a terminal."""
        table = format_table(
            ("", f"bits/{self.unit}", "bits/token", "perplexity"),
            [
                (label, f"{result.bits_per_byte:.4f}", f"{result.bits_per_token:.4f}", f"{result.perplexity:.4f}")
                for label, result in (("with memory", self.with_memory), ("memory erased", self.memory_erased))
            ],
        )
        return (
            f"{table}\nmemory gain: {self.memory_gain:.4f} bits/{self.unit} (erased minus intact) "
            f"over {self.with_memory.num_tokens:,} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as JSON values."""
        return {
            "num_tokens": self.with_memory.num_tokens,
            "num_bytes": self.with_memory.num_bytes,
            "unit": self.unit,
            "with_memory": self.with_memory.to_dict(),
            "memory_erased": self.memory_erased.to_dict(),
            "memory_gain_bits_per_byte": self.memory_gain,
        }


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    *,
    num_lanes: Integer = 8,
    rollout_length: Integer = 8,
    unit: str = "byte",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Return the likelihood of the documents, with the memory intact and with the memory erased.

    Every token of every document counts exactly once, for any number of lanes. The evaluation uses a memory of its own
    and leaves the model's mode unchanged. Sums are in float64.

    Args:
        model: The model.
        corpus: Documents; their token ids must be in the model's vocabulary.
        num_lanes: Number of documents read side by side.
        rollout_length: Number of timesteps whose readout is computed together.
        unit: Unit of the documents' size: "byte", "pixel" or "value" (`content_unit`).
        progress: Called after each rollout with the number of tokens so far.

    Raises:
        InputError: The corpus has another vocabulary size, or the model's likelihood is not finite.
    """
    model = unwrapped(model)
    check_vocabulary(model, corpus)
    stream = LaneStream(
        corpus,
        num_lanes=min(check_integer("num_lanes", num_lanes, 1), corpus.num_documents),
        segment_length=model.segment_length,
        rollout_length=rollout_length,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    calls = RecordedCalls(model)
    num_tokens = 0
    with reading(model):
        memory = model.initial_memory(stream.num_lanes)
        totals = torch.zeros(2, dtype=torch.float64, device=model.device)
        for rollout in stream:
            nll, memory = _rollout_nll(model, model.align_inputs(rollout), memory, calls)
            totals += nll
            num_tokens += rollout.count_target_tokens()
            if progress is not None:
                progress(num_tokens)
    check_likelihood(totals.tolist())
    with_memory, memory_erased = (
        Likelihood(nll=nll, num_tokens=corpus.num_tokens, num_bytes=corpus.num_bytes) for nll in totals.tolist()
    )
    return Evaluation(with_memory=with_memory, memory_erased=memory_erased, unit=unit)


def content_unit(tokenizer: Tokenizer) -> str:
    """Return the unit in which the size of a tokenizer's documents is counted: "byte", "pixel" or "value"."""
    if isinstance(tokenizer, BinTokenizer):
        return "value"
    return "pixel" if isinstance(tokenizer, PixelTokenizer) else "byte"


def check_vocabulary(model: RecurrentModel, corpus: Corpus) -> None:
    """Check that a corpus has the model's vocabulary size.

    Raises:
        InputError: The sizes differ.
        InputTypeError: It is not a `Corpus`.
    """
    check_type("corpus", corpus, Corpus, hint="; corpus_from_arrays makes one of token ids")
    if corpus.vocab_size != model.vocab_size:
        raise InputError(
            f"the corpus has a vocabulary of {corpus.vocab_size} tokens, the model one of {model.vocab_size}"
        )


def _rollout_nll(
    model: RecurrentModel, cpu_rollout: Rollout, memory: Tensor, calls: RecordedCalls
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihoods with and without memory, (2,) in nats, and the next memory.

    The rollout is on the CPU: looking at its masks there does not wait for the device.
    """
    resets, paddings = _timesteps_of(cpu_rollout.reset), _timesteps_of(cpu_rollout.input_padding)
    rollout = cpu_rollout.to(model.device)
    hiddens = []
    for timestep, segment in enumerate(rollout.inputs):
        reset = rollout.reset[timestep] if rollout.reset is not None and timestep in resets else None
        padding = rollout.input_padding
        padding = padding[timestep] if padding is not None and timestep in paddings else None
        hidden, memory = calls(_encode, segment, memory, reset, padding, name="reading a segment")
        hiddens.append(hidden)
    masks = _rows(rollout.input_padding), _rows(rollout.target_padding)
    (erased,) = calls(encode_erased, rollout.inputs.flatten(0, 1), masks[0], name="reading without memory")
    nlls = [
        calls(_read_out, rollout.targets.flatten(0, 1), hidden, *masks, name="the likelihood of segments")[0]
        for hidden in (torch.cat(hiddens), erased)
    ]
    return torch.stack(nlls), memory


def _timesteps_of(mask: Tensor | None) -> list[int]:
    """Return the timesteps at which the mask is True anywhere."""
    return [] if mask is None else mask.flatten(1).any(dim=1).nonzero()[:, 0].tolist()


def _encode(
    model: RecurrentModel, segment: Tensor, memory: Tensor, reset: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of one timestep, (B, R, D), and the next memory."""
    if reset is not None:
        memory = model.reset_memory(memory, reset)
    return model.encode(segment, memory=memory, padding_mask=padding)


def encode_erased(model: RecurrentModel, segments: Tensor, padding: Tensor | None) -> tuple[Tensor]:
    """Return the hidden states (N*B, R, D) with the initial memory at every timestep, computed as one batch."""
    hidden, _ = model.encode(segments, memory=model.initial_memory(segments.shape[0]), padding_mask=padding)
    return (hidden,)


def _read_out(
    model: RecurrentModel, targets: Tensor, hidden: Tensor, padding: Tensor | None, target_padding: Tensor | None
) -> tuple[Tensor]:
    """Return the summed negative log-likelihood of the targets in nats, in float64."""
    nll = model.token_nll(targets, hidden=hidden, hidden_padding_mask=padding, target_padding_mask=target_padding)
    return (nll.double().sum(),)


def _rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten(0, 1)
