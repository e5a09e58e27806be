"""The one shape every model here has: a recurrence over segments plus a readout.

    hidden_t, memory_{t+1} = encode(segment_t, memory_t)        # sequential in t
    logits_t               = decode(targets_t, hidden_t)        # independent over t

Training, replay, evaluation and generation are written against this class alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.errors import InputError, InputTypeError
from memformer.rollout import Rollout
from memformer.shapes import AnyMemory, Hidden, Logits, Segment, SegmentPadding, Starts, TargetPadding, Targets

# What torch's losses leave out by default; here a mask says what counts.
IGNORED = -100


class RecurrentModel(nn.Module, ABC):
    """A recurrence over segments plus a readout; rows of a batch are independent.

    Where gradients stop is for training to say: a model never detaches, but for one that is defined so (TransformerXL).
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids V that can be targets."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int:
        """The id that stands before the first token of a document."""

    @property
    @abstractmethod
    def segment_length(self) -> int:
        """Tokens of a full segment."""

    @property
    @abstractmethod
    def memory_shape(self) -> tuple[int, int]:
        """Slots K and width of one row's memory."""

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32, or float64 if the parameters are: the state must not drift over thousands of timesteps."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    @abstractmethod
    def initial_memory(self, batch_size: int) -> AnyMemory:
        """Return the memory that a document starts from, for each row."""

    def arrange(self, rollout: Rollout) -> Rollout:
        """Return a rollout as this model reads it: the same targets in the same timesteps, perhaps other inputs."""
        return rollout

    def forward(self, *args: object, **kwargs: object) -> None:
        """Refuse: a recurrence and a readout are called by their names.

        Raises:
            NotImplementedError: Always, as every torch module without a `forward` does; here it says what to call.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} has two parts: encode(segment, memory=...) reads, decode(targets, hidden=...) "
            "predicts; backpropagate(model, rollout) trains, Session(model) generates"
        )

    @abstractmethod
    def encode(
        self, segment: Segment, *, memory: AnyMemory | None = None, padding_mask: SegmentPadding | None = None
    ) -> tuple[Hidden, AnyMemory]:
        """Read one segment; return its hidden states and the memory that leaves it."""

    @property
    def auxiliary_weight(self) -> float | None:
        """Nats for each unit of the auxiliary loss, a mean over input tokens; None where there is none of its own."""
        return None

    def encode_with_auxiliary_loss(
        self, segment: Segment, *, memory: AnyMemory, padding_mask: SegmentPadding | None = None
    ) -> tuple[Hidden, AnyMemory, Float[Tensor, ""]]:
        """Read one segment as `encode` does; return also what it costs beside its likelihood, summed over its tokens.

        Raises:
            InputError: This model has no such loss.
        """
        raise InputError(f"a {type(self).__name__} has no loss beside its likelihood: its writing has no price")

    @abstractmethod
    def decode(self, targets: Targets, *, hidden: Hidden, hidden_padding_mask: SegmentPadding | None = None) -> Logits:
        """Return the logits of each target, given the targets before it and the hidden states of the past."""

    def token_nats(
        self,
        targets: Targets,
        *,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None = None,
        target_padding_mask: TargetPadding | None = None,
        starts: Starts | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the negative log-likelihood of each target in nats, in float32 or better; 0 at padding.

        Args:
            targets: Token ids, 0 .. V-1.
            hidden: From `encode`.
            hidden_padding_mask: The padding mask that `encode` was given.
            target_padding_mask: True at targets that do not count.
            starts: What the readout starts from in place of `[BOS]`, for models that can.

        Raises:
            InputError: `starts` are given and this model knows only `[BOS]`, or a token id or shape is out of range.
        """
        if starts is not None:
            raise InputError(f"starts are given, but a {type(self).__name__} starts every segment alike")
        logits = self.decode(targets, hidden=hidden, hidden_padding_mask=hidden_padding_mask)
        if target_padding_mask is not None:
            targets = targets.masked_fill(target_padding_mask, IGNORED)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_memory(self, memory: AnyMemory, reset: Bool[Tensor, " B"]) -> AnyMemory:
        """Return the memory with the rows in `reset` started again."""
        return torch.where(reset[:, None, None], self.initial_memory(memory.shape[0]), memory)

    def _enter(self, memory: AnyMemory | None, *, batch_size: int) -> AnyMemory:
        """Return the memory that enters, checked: the initial one where none is given.

        Raises:
            InputError: It is another model's.
            InputTypeError: Its dtype is wrong.
        """
        if memory is None:
            return self.initial_memory(batch_size)
        self.check_memory(memory, batch_size=batch_size)
        return memory

    def check_memory(self, memory: Tensor, *, batch_size: int) -> None:
        """Check that a memory is one of this model.

        Raises:
            InputError: The shape is not (batch_size, slots, width) of this model.
            InputTypeError: The dtype is not that of this model's memory.
        """
        expected = (batch_size, *self.memory_shape)
        if memory.shape != expected:
            raise InputError(
                f"memory has shape {tuple(memory.shape)}; this model's is {expected} "
                "(rows, slots, width): it may be the memory of another model"
            )
        if memory.dtype != self.memory_dtype:
            raise InputTypeError(f"memory has dtype {memory.dtype}; this model's is {self.memory_dtype}")


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while: no dropout; afterwards it is in the mode it was in."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def check_tokens(tokens: Tensor, *, largest: int, name: str) -> None:
    """Check dtype and range of token ids (the range on a CPU only: elsewhere it would wait for the device).

    Raises:
        InputError: There is no token, or an id is outside 0 .. `largest`.
        InputTypeError: The dtype is not int64.
    """
    if tokens.dtype != torch.int64:
        raise InputTypeError(f"{name} has dtype {tokens.dtype}; token ids must be torch.int64")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InputError(f"{name} has shape {tuple(tokens.shape)}; it must be (rows, tokens) with at least one token")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high > largest:
            hint = "; what does not count is masked by target_padding" if low == IGNORED and name == "targets" else ""
            raise InputError(f"{name} holds token id {low if low < 0 else high}; valid ids are 0 to {largest}{hint}")
