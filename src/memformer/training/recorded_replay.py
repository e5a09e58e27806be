"""The recorded pieces of replay, and the static tensors that they work on.

Static tensors hold a whole rollout; counters on the device say which timestep or chunk a piece works on, so that an
update is nothing but launches. Dropout is repeated by setting the generator back to the point at which the timestep was
first encoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memformer.models.recurrence import RecurrentModel
from memformer.rollout import Rollout
from memformer.training.gradients import Gradients
from memformer.training.pieces import (
    BufferCheck,
    NewAutocast,
    RolloutHooks,
    RolloutResult,
    auxiliary_scales,
    chunks,
    current_autocast,
    encode_timestep,
    has_auxiliary_loss,
)
from memformer.training.randomness import Randomness
from memformer.utils.cuda_graphs import RecordingFailed, Work, out_of_memory_ends_recording

# Largest difference between the hidden states of two encodings of one timestep, relative to their norm.
_LARGEST_DIFFERENCE = 1e-2

# Records some work, given what to call before each run of it and a name for messages.
Record = Callable[[Work, Work, str], Work]


@dataclass(frozen=True)
class _Encoding:
    """Which inputs besides tokens and memory a timestep has."""

    has_reset: bool
    has_padding: bool


@dataclass(frozen=True, kw_only=True)
class _Again:
    """Inputs of a timestep's second encoding, and which of its results have gradients besides the hidden states."""

    encoding: _Encoding
    with_auxiliary: bool
    with_memory: bool


@dataclass(frozen=True)
class _Reading:
    """Size and inputs of a chunk of the readout."""

    num_timesteps: int
    has_padding: bool
    has_target_padding: bool


class RecordedReplay:
    """Static tensors and recorded pieces for rollouts of one shape, of up to `capacity` timesteps."""

    def __init__(
        self,
        model: RecurrentModel,
        rollout: Rollout,
        memory: Tensor,
        gradients: Gradients,
        *,
        capacity: int,
        record: Record,
    ) -> None:
        self.model = model
        self.gradients = gradients
        self.capacity = capacity
        self._record = record
        self._pieces: dict[tuple[str, object], Work] = {}
        self._reached: dict[tuple[str, object], set[int]] = {}  # parameters that a recorded piece has a gradient for
        self._checked: set[object] = set()
        device, (_, rows, length) = model.device, rollout.inputs.shape
        self.randomness = Randomness(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.inputs = zeros(capacity, rows, length)
        self.targets = zeros(capacity, rows, rollout.targets.shape[2])
        self.reset = zeros(capacity, rows, dtype=torch.bool)
        self.input_padding = zeros(capacity, rows, length, dtype=torch.bool)
        self.target_padding = zeros(*self.targets.shape, dtype=torch.bool)
        self.is_filler = None if rollout.is_filler is None else zeros(capacity, rows, dtype=torch.bool)
        self.starts = None if rollout.decoder_start_ids is None else zeros(capacity, rows)
        # The memory before each timestep, and after the last; the gradient of the loss with respect to one of them.
        self.memories = memory.new_zeros((capacity + 1, *memory.shape))
        self.memory_grad = torch.zeros_like(memory)
        self.norms = memory.new_zeros(capacity)
        # The hidden states of each timestep; its readout replaces them by their gradients.
        self.hiddens: Tensor | None = None
        # The hidden states of the timestep encoded again, to check that dropout is repeated.
        self.hidden_again: Tensor | None = None
        self.timestep, self.chunk_start = zeros(1), zeros(1)
        self.total_nll = memory.new_zeros(())
        self.nll_scale, self.auxiliary_scales = memory.new_zeros(()), memory.new_zeros(2)
        # A graph must cast the weights itself: a cached cast is of the weights at the time of recording.
        self.autocast: NewAutocast = current_autocast(device.type, cache_enabled=False)

    def run(
        self, rollout: Rollout, memory: Tensor, *, readout_timesteps: int, gradient_scale: float, hooks: RolloutHooks
    ) -> RolloutResult:
        """Back-propagate a rollout in the model's format; arguments as in `ReplayEngine.backpropagate`."""
        with torch.autocast(self.model.device.type, enabled=False):
            return self._run(
                rollout,
                memory,
                parts=chunks(rollout.num_timesteps, readout_timesteps),
                gradient_scale=gradient_scale,
                hooks=hooks,
            )

    def _run(
        self, rollout: Rollout, memory: Tensor, *, parts: list[slice], gradient_scale: float, hooks: RolloutHooks
    ) -> RolloutResult:
        last = rollout.num_timesteps - 1
        num_tokens = rollout.count_target_tokens()
        check_buffers = BufferCheck(self.model)
        self.gradients.attach()
        # All pieces are recorded before the first one runs: recording overwrites the static tensors.
        with out_of_memory_ends_recording():
            forward, read_out, again = self._pieces_for(
                rollout, parts, with_auxiliary=has_auxiliary_loss(self.model, hooks)
            )
        self._fill(rollout, memory)
        self.nll_scale.fill_(gradient_scale / max(num_tokens, 1))

        # The same order as in `replay._replay`, so that dropout draws the same masks.
        states = []
        for timestep, encode in enumerate(forward):
            if timestep == last:
                for read in read_out[:-1]:
                    read()
            states.append(self.randomness.capture())
            encode()
            if not timestep:
                check_buffers()  # recording has also changed them, if it happened
        read_out[-1]()
        after = self.randomness.capture()
        scales = auxiliary_scales(self.model, rollout, self.total_nll, gradient_scale=gradient_scale, hooks=hooks)
        for factor, scale in zip(self.auxiliary_scales, scales, strict=True):
            factor.fill_(scale)
        for timestep in reversed(range(last + 1)):
            self.randomness.restore(states[timestep])
            if timestep == 0 and hooks.before_last_backward is not None:
                hooks.before_last_backward()
            again[timestep]()
        self.randomness.restore(after)
        self.gradients.detach_unreached()
        return RolloutResult(
            loss=self.total_nll / max(num_tokens, 1),
            num_tokens=num_tokens,
            memory=self.memories[last + 1].clone(),
            memory_grad=self.memory_grad.clone(),
            memory_grad_norms=self.norms[: last + 1].clone(),
        )

    def _pieces_for(
        self, rollout: Rollout, parts: list[slice], *, with_auxiliary: bool
    ) -> tuple[list[Work], list[Work], list[Work]]:
        """Return the encoding of each timestep, the readout of each part, and each timestep's second encoding.

        Raises:
            RecordingFailed: A piece cannot be recorded, or not repeated.
        """
        encodings = _encodings(rollout)
        readings = [_reading(rollout, part) for part in parts]
        forward = [self._piece("encode", encoding, partial(self._encode, encoding)) for encoding in encodings]
        read_out = [self._piece("read", reading, partial(self._read_out, reading)) for reading in readings]
        # The loss depends on a written memory only if there is another timestep, which reads it.
        with_memory = rollout.num_timesteps > 1
        kinds = [
            _Again(encoding=encoding, with_auxiliary=with_auxiliary, with_memory=with_memory) for encoding in encodings
        ]
        again = [self._piece("again", kind, partial(self._encode_again, kind)) for kind in kinds]
        for kind, first, second in zip(kinds, forward, again, strict=True):
            self._check_repetition(kind, first, second)
        self.gradients.reached = set().union(
            *(self._reached["read", reading] for reading in readings),
            *(self._reached["again", kind] for kind in kinds),
        )
        return forward, read_out, again

    def _fill(self, rollout: Rollout, memory: Tensor) -> None:
        """Copy a rollout into the static tensors and set the counters to its start."""
        length = rollout.num_timesteps
        for static, given in (
            (self.inputs, rollout.inputs),
            (self.targets, rollout.targets),
            (self.reset, rollout.reset),
            (self.input_padding, rollout.input_padding),
            (self.target_padding, rollout.target_padding),
            (self.is_filler, rollout.is_filler),
            (self.starts, rollout.decoder_start_ids),
        ):
            if static is not None and given is not None:
                static[:length].copy_(given, non_blocking=True)
        self.memories[0].copy_(memory)
        self._set_counters()

    def _set_counters(self, timestep: int = 0) -> None:
        self.timestep.fill_(timestep)
        for tensor in (self.chunk_start, self.total_nll, self.memory_grad):
            tensor.zero_()

    def _piece(self, name: str, inputs: object, work: Work) -> Work:
        """Return a piece of work, recorded at its first use."""
        piece = self._pieces.get((name, inputs))
        if piece is None:
            if self.hiddens is None:
                self._make_hiddens()
            gradients, randomness = self.gradients.copy(), self.randomness.capture()
            self.gradients.reached = set()
            # A timestep is encoded again from the counter's value after it.
            first = 1 if name == "again" else 0
            try:
                piece = self._record(work, lambda: self._set_counters(first), _NAMES[name])
            finally:
                self.gradients.restore(gradients)
                self.randomness.restore(randomness)
            self._pieces[name, inputs], self._reached[name, inputs] = piece, set(self.gradients.reached)
        return piece

    def _check_repetition(self, inputs: object, first: Work, second: Work) -> None:
        """Check once that a timestep's second encoding draws the same dropout as the first.

        Raises:
            RecordingFailed: The hidden states differ.
        """
        if inputs in self._checked:
            return
        assert self.hiddens is not None
        assert self.hidden_again is not None
        gradients, start = self.gradients.copy(), self.randomness.capture()
        self._set_counters()
        first()
        expected, after = self.hiddens[0].clone(), self.randomness.capture()
        self.randomness.restore(start)
        second()
        drew_as_much = _is_same_point(self.randomness.capture(), after)
        self.randomness.restore(start)
        self.gradients.restore(gradients)
        # Rounding may differ between two kernels; another dropout mask changes far more.
        size = expected.norm()
        difference = (self.hidden_again - expected).norm() / torch.where(size > 0, size, 1.0)
        if not drew_as_much or not difference < _LARGEST_DIFFERENCE:
            raise RecordingFailed(
                f"the second encoding of a timestep differs from the first by {float(difference):.1e} of its norm; "
                "the model draws random numbers that cannot be repeated (if they are not from PyTorch's own "
                "generators, replay without graphs gives wrong gradients, too)"
            )
        self._checked.add(inputs)

    def _make_hiddens(self) -> None:
        """Allocate the hidden states; their shape and dtype are the model's."""
        randomness = self.randomness.capture()
        # With gradient, as in `_encode`: a compiled model is compiled for it anyway.
        with torch.enable_grad(), self.autocast():
            hidden, _ = self.model.encode(self.inputs[0], memory=self.memories[0])
        self.hiddens = hidden.new_zeros((self.capacity, *hidden.shape))
        self.hidden_again = torch.zeros_like(hidden)
        self.randomness.restore(randomness)

    def _at(self, tensor: Tensor) -> Tensor:
        """Return the timestep's part of a static tensor."""
        return tensor.index_select(0, self.timestep)[0]

    def _encode(self, encoding: _Encoding) -> None:
        """One timestep forward: read the segment, store the hidden states and the next memory.

        With gradient enabled, though none is computed: without it, PyTorch chooses other attention kernels, and on CUDA
        their dropout was found to differ from that of the second encoding.
        """
        with torch.enable_grad():
            hidden, memory, _ = self._encode_timestep(encoding, self._at(self.memories), with_auxiliary=False)
        assert self.hiddens is not None
        self.hiddens.index_copy_(0, self.timestep, hidden.detach()[None])
        self.timestep.add_(1)
        self.memories.index_copy_(0, self.timestep, memory.detach()[None])

    def _encode_timestep(
        self, encoding: _Encoding, memory: Tensor, *, with_auxiliary: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self.autocast():
            return encode_timestep(
                self.model,
                self._at(self.inputs),
                memory,
                reset=self._at(self.reset) if encoding.has_reset else None,
                padding=self._at(self.input_padding) if encoding.has_padding else None,
                is_filler=None if self.is_filler is None else self._at(self.is_filler),
                with_auxiliary=with_auxiliary,
            )

    def _encode_again(self, kind: _Again) -> None:
        """One timestep again with gradient, the last first: pass the gradients of hidden states and memory back."""
        self.timestep.sub_(1)
        assert self.hiddens is not None
        with torch.enable_grad():
            entering = self._at(self.memories).requires_grad_()
            hidden, memory, auxiliary = self._encode_timestep(
                kind.encoding, entering, with_auxiliary=kind.with_auxiliary
            )
        assert self.hidden_again is not None
        self.hidden_again.copy_(hidden.detach())
        outputs = [(hidden, self._at(self.hiddens)), (auxiliary, self.auxiliary_scales)]
        if kind.with_memory:
            outputs.append((memory, self.memory_grad))
        memory_grad = self._add_gradients(entering, [pair for pair in outputs if pair[0].requires_grad])
        if memory_grad is None:
            self.memory_grad.zero_()
        else:
            self.memory_grad.copy_(memory_grad)
        self.norms.index_copy_(0, self.timestep, self.memory_grad.norm()[None])

    def _read_out(self, reading: _Reading) -> None:
        """One chunk of timesteps read out together; its hidden states are replaced by their gradients."""
        assert self.hiddens is not None
        index = self.chunk_start + torch.arange(reading.num_timesteps, device=self.chunk_start.device)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index).flatten(0, 1)

        with torch.enable_grad():
            hidden = rows(self.hiddens).requires_grad_()
            with self.autocast():
                nll = self.model.token_nll(
                    rows(self.targets),
                    hidden=hidden,
                    hidden_padding_mask=rows(self.input_padding) if reading.has_padding else None,
                    target_padding_mask=rows(self.target_padding) if reading.has_target_padding else None,
                    decoder_start_ids=None if self.starts is None else rows(self.starts),
                ).sum()
        hidden_grad = self._add_gradients(hidden, [(nll, self.nll_scale.to(nll.dtype))])
        assert hidden_grad is not None
        self.hiddens.index_copy_(0, index, hidden_grad.unflatten(0, (reading.num_timesteps, -1)))
        self.total_nll.add_(nll.detach())
        self.chunk_start.add_(reading.num_timesteps)

    def _add_gradients(self, leaf: Tensor, outputs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Add the gradients of the parameters; return that of `leaf`, None if the outputs do not depend on it."""
        if not outputs:
            return None
        leaf_grad, *gradients = torch.autograd.grad(
            [output for output, _ in outputs],
            [leaf, *self.gradients.parameters],
            [grad for _, grad in outputs],
            allow_unused=True,
        )
        self.gradients.add(tuple(gradients))
        return leaf_grad


def _is_same_point(left: Tensor | int, right: Tensor | int) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return bool(left == right)


_NAMES = {
    "encode": "the encoding of a timestep",
    "again": "the second encoding of a timestep",
    "read": "the readout",
}


def _encodings(rollout: Rollout) -> list[_Encoding]:
    # Resets count even if there is none: the loss then depends on the initial memory, with a gradient of zero.
    has_reset = rollout.reset is not None
    if rollout.input_padding is None:
        return [_Encoding(has_reset=has_reset, has_padding=False)] * rollout.num_timesteps
    paddings: list[bool] = rollout.input_padding.flatten(1).any(dim=1).tolist()
    return [_Encoding(has_reset=has_reset, has_padding=has_padding) for has_padding in paddings]


def _reading(rollout: Rollout, part: slice) -> _Reading:
    return _Reading(
        part.stop - part.start,
        has_padding=rollout.input_padding is not None and bool(rollout.input_padding[part].any()),
        has_target_padding=rollout.target_padding is not None and bool(rollout.target_padding[part].any()),
    )
