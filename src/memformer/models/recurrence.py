"""Common interface of all models: a recurrence over segments plus a readout.

    hidden_t, memory_{t+1} = encode(segment_t, memory_t)        # sequential in t
    logits_t               = decode(targets_t, hidden_t)        # independent over t

Training, replay, evaluation and generation depend on this interface alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.errors import InputError, InputTypeError
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.linear import is_transformed
from memformer.rollout import Rollout
from memformer.shapes import DecoderStartIds, Hidden, Logits, Memory, Segment, SegmentPadding, TargetPadding, Targets
from memformer.utils.checks import check_type
from memformer.utils.modules import modules_inside
from memformer.utils.words import with_article

# Target id that PyTorch's losses ignore by default; here a mask marks the targets that are not counted.
IGNORED = -100


class RecurrentModel(nn.Module, ABC):
    """Recurrence over segments plus a readout; rows of a batch are independent.

    The training code decides where gradients stop: a model never detaches, except where its definition says so
    (TransformerXL).
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids V that can be targets."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int:
        """Token id that precedes the first token of a document."""

    @property
    @abstractmethod
    def segment_length(self) -> int:
        """Number of tokens of a full segment."""

    @property
    @abstractmethod
    def memory_shape(self) -> tuple[int, int]:
        """Number of slots K and slot width of one row's memory."""

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32, or float64 if the parameters are: the memory must not drift over thousands of timesteps."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    @abstractmethod
    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory at the start of a document, for each row."""

    def align_inputs(self, rollout: Rollout) -> Rollout:
        """Return the rollout in this model's format: the same targets in the same timesteps, possibly other inputs."""
        return rollout

    def compile(self, **options: object) -> None:
        """Raise an error: a model is not called as a whole, so compiling its call would have no effect.

        Raises:
            InputError: Always; a Memformer has a method of its own.
        """
        raise InputError(
            f"{with_article(type(self).__name__)} cannot be compiled in one call, because it is not called as a whole; "
            "compile its layers instead (module.compile() of each)"
        )

    # Methods that the error message of `forward` names, besides `encode`.
    _other_calls = "decode(targets, hidden=...) to predict, Session(model) to generate"

    def forward(self, *args: object, **kwargs: object) -> None:
        """Raise an error, because `encode` and `decode` are called by name.

        Raises:
            NotImplementedError: Always, as for any module without a `forward`; the message names the methods to call.
        """
        raise NotImplementedError(
            f"{with_article(type(self).__name__)} cannot be called directly; use encode(segment, memory=...) to read, "
            f"{self._other_calls}, backpropagate(model, rollout) to train"
        )

    @abstractmethod
    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return its hidden states and the next memory.

        Args:
            segment: Token ids.
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding. None: no padding.
            auxiliary: Receives the model's auxiliary loss, if given; see `check_auxiliary_loss`.
        """

    def check_auxiliary_loss(self) -> None:
        """Check that this model has an auxiliary loss, which `encode` can put into `auxiliary`.

        Raises:
            InputError: The model has none; the message gives the reason.
        """
        raise InputError(f"{with_article(type(self).__name__)} has no auxiliary loss")

    @property
    def auxiliary_weight(self) -> float:
        """Weight of the model's own auxiliary loss, in nats per input token; 0 if training adds none."""
        return 0.0

    @abstractmethod
    def decode(self, targets: Targets, *, hidden: Hidden, hidden_padding_mask: SegmentPadding | None = None) -> Logits:
        """Return the logits of each target, given earlier targets and the hidden states of the past."""

    def token_nll(
        self,
        targets: Targets,
        *,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None = None,
        target_padding_mask: TargetPadding | None = None,
        decoder_start_ids: DecoderStartIds | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the negative log-likelihood of each target in nats, in at least float32; 0 at padding.

        Args:
            targets: Token ids, 0 .. V-1.
            hidden: Hidden states from `encode`.
            hidden_padding_mask: Padding mask that was passed to `encode`.
            target_padding_mask: True at targets that are not counted.
            decoder_start_ids: Token ids that the readout starts from instead of `[BOS]`, for models that support it.

        Raises:
            InputError: `decoder_start_ids` are given and this model supports only `[BOS]`, or a token id or shape is
                out of range.
        """
        if decoder_start_ids is not None:
            raise InputError(
                f"decoder_start_ids are given, but {with_article(type(self).__name__)} does not support them"
            )
        check_tokens(targets, largest=torch.iinfo(torch.int64).max, name="targets")  # -100 would be left out silently
        logits = self.decode(targets, hidden=hidden, hidden_padding_mask=hidden_padding_mask)
        if target_padding_mask is not None:
            targets = targets.masked_fill(target_padding_mask, IGNORED)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Number of parameters; shared ones are counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_memory(self, memory: Memory, reset: Bool[Tensor, " B"]) -> Memory:
        """Return the memory with the rows in `reset` set to the initial memory."""
        return torch.where(reset[:, None, None], self.initial_memory(memory.shape[0]), memory)

    def _enter(self, memory: Memory | None, *, batch_size: int) -> Memory:
        """Return the checked memory, or the initial memory if None is given.

        Raises:
            InputError: The memory is of another model.
            InputTypeError: The dtype is wrong.
        """
        if memory is None:
            return self.initial_memory(batch_size)
        self.check_memory(memory, batch_size=batch_size)
        return memory

    def check_memory(self, memory: Tensor, *, batch_size: int) -> None:
        """Check that a memory fits this model.

        Raises:
            InputError: The shape is not (batch_size, slots, width) of this model.
            InputTypeError: It is not a tensor, or the dtype is not that of this model's memory.
        """
        check_type("memory", memory, Tensor)
        expected = (batch_size, *self.memory_shape)
        if memory.shape != expected:
            raise InputError(
                f"memory has shape {tuple(memory.shape)}; this model's is {expected} "
                "(rows, slots, width): it may be the memory of another model"
            )
        if memory.dtype != self.memory_dtype:
            raise InputTypeError(f"memory has dtype {memory.dtype}; this model's is {self.memory_dtype}")


def unwrapped(model: nn.Module) -> RecurrentModel:
    """Return the model inside `torch.compile`, `DataParallel` or `DistributedDataParallel`; else the model itself.

    Raises:
        InputTypeError: It is not a recurrent model.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, RecurrentModel):
        is_parallel = isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = inner.module if is_parallel else inner._modules.get("_orig_mod")
    if not isinstance(inner, RecurrentModel):
        advice = "; give its .module" if isinstance(getattr(model, "module", None), RecurrentModel) else ""
        raise InputTypeError(
            f"model is {with_article(type(model).__name__)}; it must be a memformer model (Memformer, TransformerXL, "
            f"...) or one wrapped by torch.compile, DataParallel or DistributedDataParallel{advice}"
        )
    return inner


@dataclass
class _Modes:
    """The modules in training mode before the first of a model's readers, and how many readers there are."""

    num_readers: int
    in_training: list[nn.Module]


_modes: WeakKeyDictionary[nn.Module, _Modes] = WeakKeyDictionary()
_modes_lock = Lock()


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Make a `with` block independent of the caller's modes, so that what it computes can be kept.

    No dropout, no gradient, no autocast, and no inference mode (whose tensors cannot be used outside it). Afterwards
    every module has the mode that it had, also if several threads read with one model.
    """
    with _modes_lock:
        modes = _modes.get(model)
        if modes is None:
            every = (model, *modules_inside(model))
            modes = _modes[model] = _Modes(0, [module for module in every if module.training])
            if modes.in_training:
                model.eval()
        modes.num_readers += 1
    try:
        device_type = next(model.parameters()).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _modes_lock:
            modes.num_readers -= 1
            if not modes.num_readers:
                for module in modes.in_training:
                    module.training = True
                del _modes[model]


def read_bos(model: RecurrentModel, batch_size: int) -> tuple[Hidden, Memory, SegmentPadding]:
    """Read `[BOS]` as the first segment of a document, as the timesteps of rollouts do: one token, the rest is padding.

    A segment of one token would be the same only up to rounding.

    Returns:
        The hidden states, the memory after it and the segment's padding.
    """
    segment = torch.zeros((batch_size, model.segment_length), dtype=torch.int64, device=model.device)
    segment[:, 0] = model.bos_token_id
    padding = torch.ones_like(segment, dtype=torch.bool)
    padding[:, 0] = False
    hidden, memory = model.encode(segment, memory=model.initial_memory(batch_size), padding_mask=padding)
    return hidden, memory, padding


def check_tokens(tokens: object, *, largest: int, name: str) -> None:
    """Check the type and, on a CPU only, the range of token ids: elsewhere it would synchronize the device.

    Raises:
        InputError: There is no token, or a token id is outside 0 .. `largest`.
        InputTypeError: The tokens are not a tensor of dtype int64.
    """
    check_type(name, tokens, Tensor, hint=" of token ids, (rows, tokens)")
    assert isinstance(tokens, Tensor)
    if tokens.dtype != torch.int64:
        raise InputTypeError(f"{name} has dtype {tokens.dtype}; token ids must be torch.int64")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InputError(f"{name} has shape {tuple(tokens.shape)}; it must be (rows, tokens) with at least one token")
    # Values are not checked where tensors stand for something else: while a graph is traced, or under torch.func.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed() and tokens.numel():
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high > largest:
            hint = (
                "; mask targets that are not counted with target_padding"
                if low == IGNORED and name == "targets"
                else ""
            )
            raise InputError(f"{name} holds token id {low if low < 0 else high}; valid ids are 0 to {largest}{hint}")
