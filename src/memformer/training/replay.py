"""Memory replay back-propagation, and the two methods it must agree with (arXiv 2010.06891, Algorithm 1).

A rollout's loss is differentiated exactly by all three: through every timestep, and not beyond the rollout's edge.

- "bptt" keeps the whole graph. "checkpoint" keeps it in pieces that are recomputed (torch.utils.checkpoint).
- "replay" keeps memories and hidden states only:
    1. without gradient, encode the timesteps in order, all but the last;
    2. read them out in chunks, with gradient: loss, and d loss / d hidden;
    3. encode the last timestep with gradient, read it out and differentiate it; then from the one before it to the
       first, encode again with gradient and carry d loss / d memory backwards.

A model may have an auxiliary loss beside its likelihood (`RecurrentModel.encode_with_auxiliary_loss`): a price on
writing (a departure: the paper has none), or what a Compressive Transformer learns to compress by. It is part of what
is differentiated, not of the loss returned.

Departure from Algorithm 1: there the readout is recomputed timestep by timestep together with the encoder. It does not
depend on time, so here it runs once, in chunks as large as memory allows; the extra cost is one encoder forward of all
timesteps but the last.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer.errors import InputError
from memformer.models.recurrence import RecurrentModel
from memformer.rollout import Rollout
from memformer.training.randomness import capture_randomness, restore_randomness

Method = Literal["replay", "bptt", "checkpoint"]
NewAutocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """What one rollout gave.

    Attributes:
        loss: Mean nats per non-padding target token of the rollout, detached; 0 if there is none.
        num_tokens: Number of non-padding target tokens.
        memory: (B, K, D), the memory that leaves the rollout, detached.
        memory_grad: (B, K, D), d loss / d memory entering the rollout (scaled like the gradients).
        memory_grad_norms: (N,), norm of d loss / d memory entering each timestep, over all rows: how far back what is
            to be predicted reaches. The first is `memory_grad`'s.
    """

    loss: Tensor
    num_tokens: int
    memory: Tensor
    memory_grad: Tensor
    memory_grad_norms: Tensor


def backpropagate(
    model: RecurrentModel,
    rollout: Rollout,
    *,
    memory: Tensor | None = None,
    method: str = "replay",
    readout_timesteps: int = 1,
    gradient_scale: float = 1.0,
    write_price: float = 0.0,
    write_price_below: float = math.inf,
    before_last_backward: Callable[[], object] | None = None,
) -> RolloutResult:
    """Add the gradient of the rollout's loss to every parameter's `.grad`; return the loss and the memory.

    The gradient stops at the rollout's edge: the entering memory is detached, and `memory_grad` says what arrives
    there. Rows with `reset` start from the initial memory, which does get gradient. An ambient autocast is respected
    in the forward computation.

    Args:
        model: Any recurrence with a readout.
        rollout: What is read and predicted, on the model's device.
        memory: The memory that enters; None means the initial memory, as if every row were reset first.
        method: "replay", "bptt" or "checkpoint"; all give the same gradient.
        readout_timesteps: Timesteps read out together: more is faster and takes more memory. The last timestep is
            read out by itself, unless all are read out together.
        gradient_scale: Factor on the gradients, for accumulating several rollouts in one update.
        write_price: Nats for each unit of `WritePressure`, as a mean over the rollout's non-padding input
            tokens, added to the loss that is differentiated. Above 0 the model must be a Memformer with a sparse write.
            (An auxiliary loss of the model's own is added likewise, by its `auxiliary_weight`.)
        write_price_below: The price is due only where the rollout's loss is below this, in nats per token: what is
            not learned yet needs its writes.
        before_last_backward: Called once, before the last backward pass of the several that replay makes: where
            gradients are summed over processes, that pass is the one to do it.

    Raises:
        InputError: The method is unknown, `readout_timesteps` is below 1, the memory is another model's, or writing has
            a price and the model has no sparse write.
        InputTypeError: The memory has the wrong dtype.
    """
    if method not in get_args(Method):
        raise InputError(f"method ({method!r}) must be one of {', '.join(get_args(Method))}")
    if readout_timesteps < 1:
        raise InputError(f"readout_timesteps ({readout_timesteps}) must be at least 1")
    if write_price and model.auxiliary_weight is not None:
        raise InputError(f"write_price ({write_price}) must be 0: a {type(model).__name__} does not write to slots")
    auxiliary_weight = write_price if model.auxiliary_weight is None else model.auxiliary_weight
    if memory is None:
        memory = model.initial_memory(rollout.batch_size)
        first = torch.zeros(rollout.inputs.shape[:2], dtype=torch.bool, device=rollout.inputs.device)
        first[0] = True
        reset = first if rollout.reset is None else rollout.reset | first
        rollout = dataclasses.replace(rollout, reset=reset)
    rollout = model.arrange(rollout)
    model.check_memory(memory, batch_size=rollout.batch_size)
    # The one place where gradient is cut. A clone, so that asking for its gradient leaves the caller's tensor alone.
    memory = memory.detach().clone()
    num_tokens = rollout.count_target_tokens()
    device_type = rollout.inputs.device.type
    # Backward must not run under autocast, and a cast that was cached without gradient must not be used with it: so
    # the ambient autocast is switched off here and entered anew around each piece of forward computation.
    autocast = partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )
    with torch.autocast(device_type, enabled=False):
        work = _Work(
            model,
            rollout,
            nats_scale=gradient_scale / max(num_tokens, 1),
            readout_timesteps=readout_timesteps,
            autocast=autocast,
            auxiliary_scale=gradient_scale * auxiliary_weight / max(rollout.count_input_tokens(), 1),
            price_below=(write_price_below if write_price else math.inf) * num_tokens if num_tokens else 0.0,
            before_last_backward=before_last_backward or _do_nothing,
        )
        if method == "replay":
            total_nats, memory, memory_grad, norms = _replay(work, memory)
        else:
            total_nats, memory, memory_grad, norms = _unroll(work, memory, recompute=method == "checkpoint")
    return RolloutResult(
        loss=total_nats / max(num_tokens, 1),
        num_tokens=num_tokens,
        memory=memory,
        memory_grad=memory_grad,
        memory_grad_norms=norms,
    )


@dataclass(frozen=True)
class _Work:
    """The two pieces of forward computation that every method puts together."""

    model: RecurrentModel
    rollout: Rollout
    nats_scale: float
    readout_timesteps: int
    autocast: NewAutocast
    auxiliary_scale: float
    price_below: float
    before_last_backward: Callable[[], object]

    def encode(self, timestep: int, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, S, D) hidden, the next memory (B, K, D) and the auxiliary loss, a scalar."""
        with self.autocast():
            if self.rollout.reset is not None:
                memory = self.model.reset_memory(memory, self.rollout.reset[timestep])
            padding = self.rollout.input_padding
            segment, padding = self.rollout.inputs[timestep], None if padding is None else padding[timestep]
            # Without gradient it would not be used.
            if self.auxiliary_scale and torch.is_grad_enabled():
                return self.model.encode_with_auxiliary_loss(segment, memory=memory, padding_mask=padding)
            hidden, memory = self.model.encode(segment, memory=memory, padding_mask=padding)
            return hidden, memory, memory.new_zeros(())

    def price_of(self, total_nats: Tensor) -> float:
        """Return the factor on the auxiliary loss, where the rollout's targets took so many nats."""
        return self.auxiliary_scale if self.auxiliary_scale and float(total_nats) < self.price_below else 0.0

    def read_out(self, chunk: slice, *hiddens: Tensor) -> Tensor:
        """Return the summed nats of the targets of a chunk of timesteps, given their hidden states (B, S, D)."""
        with self.autocast():
            rollout = self.rollout
            nats = self.model.token_nats(
                rollout.targets[chunk].flatten(0, 1),
                hidden=torch.cat(hiddens),
                hidden_padding_mask=_rows(rollout.input_padding, chunk),
                target_padding_mask=_rows(rollout.target_padding, chunk),
                starts=_rows(rollout.starts, chunk),
            )
            return nats.sum()

    @property
    def chunks(self) -> list[slice]:
        """The timesteps, in groups that are read out together.

        The last timestep is read out while its encoding is held: unless all are read out together, by itself.
        """
        size, last = self.readout_timesteps, self.rollout.num_timesteps - 1
        if size > last:
            return [slice(0, last + 1)]
        return [slice(start, min(start + size, last)) for start in range(0, last, size)] + [slice(last, last + 1)]


def _rows(tensor: Tensor | None, chunk: slice) -> Tensor | None:
    return None if tensor is None else tensor[chunk].flatten(0, 1)


def _unroll(work: _Work, memory: Tensor, *, recompute: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the whole graph at once; with `recompute` each piece keeps only what enters it.

    Returns:
        Total nats, the memory that leaves, d loss / d memory that enters, and its norms at every timestep.
    """
    run = partial(checkpoint, use_reentrant=False) if recompute else _call
    entering = [memory.requires_grad_()]
    hiddens: list[Tensor] = []
    total_auxiliary, total_nats = memory.new_zeros(()), memory.new_zeros(())
    *earlier_chunks, last_chunk = work.chunks
    last = work.rollout.num_timesteps - 1
    # In the order of `_replay`, which decides what dropout draws.
    for timestep in range(last + 1):
        if timestep == last:
            for chunk in earlier_chunks:
                total_nats = total_nats + run(work.read_out, chunk, *hiddens[chunk])
        hidden, memory, auxiliary = run(work.encode, timestep, memory)
        hiddens.append(hidden)
        if timestep < last:
            # A tensor of its own: what the decoder reads of the memory at this timestep does not enter the next one.
            memory = memory.view_as(memory)
            entering.append(memory)
            if memory.requires_grad:  # that of a Transformer-XL does not: it is cut by definition
                memory.retain_grad()
        total_auxiliary = total_auxiliary + auxiliary
    total_nats = total_nats + run(work.read_out, last_chunk, *hiddens[last_chunk])
    work.before_last_backward()
    (total_nats * work.nats_scale + total_auxiliary * work.price_of(total_nats.detach())).backward()
    grads = [_grad_of(each) for each in entering]
    return total_nats.detach(), memory.detach(), grads[0], torch.stack([grad.norm() for grad in grads])


def _do_nothing() -> None:
    pass


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _replay(work: _Work, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate one piece at a time; see the module's docstring for the three steps.

    Returns:
        As `_unroll`.
    """
    device = memory.device
    last = work.rollout.num_timesteps - 1
    *earlier_chunks, last_chunk = work.chunks
    replay_buffer, randomness, hiddens = [], [], []
    with torch.no_grad():
        for timestep in range(last):
            randomness.append(capture_randomness(device))
            replay_buffer.append(memory)
            hidden, memory, _ = work.encode(timestep, memory)
            hiddens.append(hidden)

    total_nats = memory.new_zeros(())
    hidden_grads: list[Tensor | None] = []

    def read_out(chunk: slice) -> None:
        leaves = [leaf.requires_grad_() for leaf in hiddens[chunk]]
        nats = work.read_out(chunk, *leaves)
        (nats * work.nats_scale).backward()
        total_nats.add_(nats.detach())
        hidden_grads.extend(leaf.grad for leaf in leaves)
        # Free the hidden states that were read out.
        hiddens[chunk] = [leaf.new_empty(0) for leaf in leaves]

    for chunk in earlier_chunks:
        read_out(chunk)
    # The last timestep is the first to be differentiated: its graph is kept, so it is not encoded twice.
    entering = memory.requires_grad_()
    hidden, next_memory, auxiliary = work.encode(last, entering)
    hiddens.append(hidden.detach())
    last_memory = next_memory.detach()
    read_out(last_chunk)

    after = capture_randomness(device)
    price = memory.new_tensor(work.price_of(total_nats))
    if last == 0:
        work.before_last_backward()
    _backward((hidden, hidden_grads.pop()), (auxiliary, price))
    memory_grad = _grad_of(entering)
    norms = [memory_grad.norm()]
    for timestep in reversed(range(last)):
        # The next timestep must not be built while this one's graph is still held.
        del hidden, next_memory, auxiliary, entering
        restore_randomness(randomness.pop(), device=device)
        entering = replay_buffer.pop().requires_grad_()
        hidden, next_memory, auxiliary = work.encode(timestep, entering)
        if timestep == 0:
            work.before_last_backward()
        _backward((hidden, hidden_grads.pop()), (next_memory, memory_grad), (auxiliary, price))
        memory_grad = _grad_of(entering)
        norms.append(memory_grad.norm())
    restore_randomness(after, device=device)
    return total_nats, last_memory, memory_grad, torch.stack(norms[::-1])


def _backward(*outputs_and_grads: tuple[Tensor, Tensor | None]) -> None:
    """Back-propagate from several outputs at once; those without gradient or graph take no part."""
    taking_part = [(output, grad) for output, grad in outputs_and_grads if output.requires_grad and grad is not None]
    if taking_part:
        outputs, grads = zip(*taking_part, strict=True)
        torch.autograd.backward(outputs, grads)


def _grad_of(memory: Tensor) -> Tensor:
    return torch.zeros_like(memory) if memory.grad is None else memory.grad
