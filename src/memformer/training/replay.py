"""Memory replay back-propagation and two reference methods (arXiv 2010.06891, Algorithm 1).

All three methods compute the exact gradient of a rollout's loss through all its timesteps; the gradient stops at the
start of the rollout.

- "bptt" keeps the whole graph. "checkpoint" splits it into pieces that are recomputed (torch.utils.checkpoint).
- "replay" keeps only memories and hidden states:
    1. Encode all timesteps but the last in order, without gradient.
    2. Read them out in chunks, with gradient; this gives the loss and d loss / d hidden.
    3. Encode the last timestep with gradient, read it out and back-propagate. Then, from the second-to-last timestep
       to the first, encode again with gradient and propagate d loss / d memory backwards.

A model may have an auxiliary loss in addition to the negative log-likelihood (`AuxiliaryLoss`): the Memformer's write
penalty (a departure: the paper has none), or the Compressive Transformer's reconstruction loss. It contributes to the
gradient, but not to the returned loss.

Departure from Algorithm 1: the paper recomputes the readout (decoder and loss) timestep by timestep together with the
encoder. The readout does not depend on later timesteps, so here it runs once, in chunks of `readout_timesteps`
timesteps. The extra cost over BPTT is one encoder forward pass for all timesteps but the last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer.models.recurrence import RecurrentModel
from memformer.rollout import Rollout
from memformer.training.distributed_tensors import is_sharded
from memformer.training.pieces import (
    NO_HOOKS,
    BufferCheck,
    NewAutocast,
    RolloutHooks,
    RolloutResult,
    auxiliary_scales,
    check_arguments,
    check_can_replay,
    check_no_cached_weights,
    chunks,
    current_autocast,
    encode_timestep,
    has_auxiliary_loss,
    prepare,
    trainable,
)
from memformer.training.randomness import capture_randomness, restore_randomness
from memformer.utils.checks import Integer, Number, check_choice

__all__ = ["Method", "RolloutHooks", "RolloutResult", "backpropagate"]

Method = Literal["replay", "bptt", "checkpoint"]


def backpropagate(
    model: nn.Module,
    rollout: Rollout,
    *,
    memory: Tensor | None = None,
    method: str = "replay",
    readout_timesteps: Integer = 1,
    gradient_scale: Number = 1.0,
    hooks: RolloutHooks = NO_HOOKS,
) -> RolloutResult:
    """Add the gradient of a rollout's loss to the `.grad` of every parameter; return the loss and the new memory.

    The gradient stops at the start of the rollout: the given memory is detached, and `memory_grad` is the gradient with
    respect to it. Rows with `reset` start from the initial memory, which does receive gradient. An enclosing
    `torch.autocast` applies to the forward computation.

    Args:
        model: The recurrent model.
        rollout: The input and target segments, on the model's device.
        memory: (B, K, W), the memory at the start of the rollout. None: the initial memory, as if every row were reset
            at the first timestep.
        method: "replay", "bptt" or "checkpoint"; all give the same gradients.
        readout_timesteps: Timesteps whose readout is computed together; larger values are faster and need more device
            memory. The last timestep is read out separately unless all timesteps fit into one chunk.
        gradient_scale: Factor on the gradients, for accumulating several rollouts into one update.
        hooks: Weight of the auxiliary loss, and a callback before the last backward pass.

    Raises:
        InputError: The method is unknown, `readout_timesteps` is below 1, the memory has a wrong shape, gradients are
            disabled, an input or a target is not a token id, a timestep without input tokens has targets, parametrized
            weights are cached, an auxiliary weight is given for a model without an auxiliary loss, or a shortfall
            weight without an auxiliary weight; with method "replay" also: a parameter has a hook on its gradient, which
            would see parts; with "replay" and "checkpoint": a buffer of the model changes when it reads.
        InputTypeError: The rollout is not a `Rollout`, or the memory has the wrong dtype.
    """
    check_choice("method", method, get_args(Method))
    model = trainable(model)
    check_no_cached_weights()
    if method == "replay":
        check_can_replay(model)
    readout_timesteps, gradient_scale = check_arguments(
        rollout, readout_timesteps=readout_timesteps, gradient_scale=gradient_scale
    )
    rollout, memory = prepare(model, rollout, memory, hooks=hooks)
    num_tokens = rollout.count_target_tokens()
    device_type = rollout.inputs.device.type
    # The backward pass must not run under autocast, and a cast cached without gradient must not be reused with
    # gradient. Therefore autocast is disabled here and entered again around each piece of forward computation.
    # FSDP2 reduces the gradients of a layer after each of its backward passes. A cast that is shared by several of them
    # would be back-propagated later, and what then arrives would be lost.
    autocast = current_autocast(device_type, cache_enabled=not is_sharded(model))
    with torch.autocast(device_type, enabled=False):
        work = _Work(
            model,
            rollout,
            nll_scale=gradient_scale / max(num_tokens, 1),
            readout_timesteps=readout_timesteps,
            autocast=autocast,
            gradient_scale=gradient_scale,
            hooks=hooks,
        )
        if method == "replay":
            total_nll, memory, memory_grad, norms = _replay(work, memory)
        else:
            total_nll, memory, memory_grad, norms = _unroll(work, memory, recompute=method == "checkpoint")
    return RolloutResult(
        loss=total_nll / max(num_tokens, 1),
        num_tokens=num_tokens,
        memory=memory,
        memory_grad=memory_grad,
        memory_grad_norms=norms,
    )


@dataclass(frozen=True)
class _Work:
    """The two pieces of forward computation shared by all methods: encoding a timestep and reading out a chunk."""

    model: RecurrentModel
    rollout: Rollout
    nll_scale: float
    readout_timesteps: int
    autocast: NewAutocast
    gradient_scale: float
    hooks: RolloutHooks

    def encode(self, timestep: int, memory: Tensor, *, with_auxiliary: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states (B, R, D), the next memory (B, K, W), and the auxiliary loss and shortfall (2,)."""
        rollout = self.rollout
        with self.autocast():
            return encode_timestep(
                self.model,
                rollout.inputs[timestep],
                memory,
                reset=None if rollout.reset is None else rollout.reset[timestep],
                padding=None if rollout.input_padding is None else rollout.input_padding[timestep],
                is_filler=None if rollout.is_filler is None else rollout.is_filler[timestep],
                with_auxiliary=with_auxiliary and has_auxiliary_loss(self.model, self.hooks),
            )

    def auxiliary_scales(self, total_nll: Tensor) -> Tensor:
        """Return the factors (2,) on the summed auxiliary loss and shortfall, given the summed likelihood."""
        scales = auxiliary_scales(
            self.model, self.rollout, total_nll, gradient_scale=self.gradient_scale, hooks=self.hooks
        )
        return total_nll.new_tensor(scales)

    def before_last_backward(self) -> None:
        """Call the hook, if given."""
        if self.hooks.before_last_backward is not None:
            self.hooks.before_last_backward()

    def read_out(self, chunk: slice, *hiddens: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of a chunk, given the hidden states (B, R, D) of its timesteps."""
        with self.autocast():
            rollout = self.rollout
            nll = self.model.token_nll(
                rollout.targets[chunk].flatten(0, 1),
                hidden=torch.cat(hiddens),
                hidden_padding_mask=_rows(rollout.input_padding, chunk),
                target_padding_mask=_rows(rollout.target_padding, chunk),
                decoder_start_ids=_rows(rollout.decoder_start_ids, chunk),
            )
            return nll.sum()

    @property
    def chunks(self) -> list[slice]:
        """The timesteps, grouped into chunks that are read out together."""
        return chunks(self.rollout.num_timesteps, self.readout_timesteps)


def _rows(tensor: Tensor | None, chunk: slice) -> Tensor | None:
    return None if tensor is None else tensor[chunk].flatten(0, 1)


def _unroll(work: _Work, memory: Tensor, *, recompute: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back-propagate through the whole graph at once; with `recompute`, each piece stores only its inputs.

    Returns:
        The summed negative log-likelihood, the memory after the last timestep, d loss / d memory at the start, and the
        norms of d loss / d memory at every timestep.
    """
    run = partial(checkpoint, use_reentrant=False) if recompute else _call
    entering = [memory.requires_grad_()]
    hiddens: list[Tensor] = []
    total_auxiliary, total_nll = memory.new_zeros(2), memory.new_zeros(())
    *earlier_chunks, last_chunk = work.chunks
    last = work.rollout.num_timesteps - 1
    check_buffers = BufferCheck(work.model) if recompute else None
    # The same order as in `_replay`, so that dropout draws the same masks.
    for timestep in range(last + 1):
        if timestep == last:
            for chunk in earlier_chunks:
                total_nll = total_nll + run(work.read_out, chunk, *hiddens[chunk])
        hidden, memory, auxiliary = run(work.encode, timestep, memory)
        hiddens.append(hidden)
        if timestep < last:
            # A separate tensor: the readout of this timestep may also read the memory, and the retained gradient must
            # contain only what flows back from the next timestep.
            memory = memory.view_as(memory)
            entering.append(memory)
            if memory.requires_grad:  # False for Transformer-XL, whose memory is detached by definition
                memory.retain_grad()
        total_auxiliary = total_auxiliary + auxiliary
    total_nll = total_nll + run(work.read_out, last_chunk, *hiddens[last_chunk])
    if check_buffers is not None:
        check_buffers()
    work.before_last_backward()
    scales = work.auxiliary_scales(total_nll.detach())
    loss = total_nll * work.nll_scale + (total_auxiliary * scales).sum()
    if loss.requires_grad:  # something may be learned
        loss.backward()
    grads = [_grad_of(each) for each in entering]
    return total_nll.detach(), memory.detach(), grads[0], torch.stack([grad.norm() for grad in grads])


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _replay(work: _Work, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back-propagate one piece at a time; the module docstring describes the three steps.

    Returns:
        The same values as `_unroll`.
    """
    device = memory.device
    last = work.rollout.num_timesteps - 1
    *earlier_chunks, last_chunk = work.chunks
    replay_buffer, randomness, hiddens = [], [], []
    check_buffers = BufferCheck(work.model)
    # On CUDA with gradient, though none is computed: without it PyTorch may choose another attention kernel, which
    # drops other weights than that of the second encoding.
    with torch.set_grad_enabled(device.type == "cuda"):
        for timestep in range(last):
            randomness.append(capture_randomness(device))
            replay_buffer.append(memory)
            hidden, memory, _ = work.encode(timestep, memory, with_auxiliary=False)
            # Detached, because a model may return one tensor as both, and each has a gradient of its own.
            hiddens.append(hidden.detach())
            memory = memory.detach()
            del hidden, _  # and with them the graph, if there is one
    check_buffers()

    total_nll = memory.new_zeros(())
    hidden_grads: list[Tensor | None] = []

    def read_out(chunk: slice) -> None:
        leaves = [leaf.requires_grad_() for leaf in hiddens[chunk]]
        nll = work.read_out(chunk, *leaves)
        (nll * work.nll_scale).backward()
        total_nll.add_(nll.detach())
        hidden_grads.extend(leaf.grad for leaf in leaves)
        # Free these hidden states.
        hiddens[chunk] = [leaf.new_empty(0) for leaf in leaves]

    for chunk in earlier_chunks:
        read_out(chunk)
    # Back-propagation starts with the last timestep, so its graph is kept and it is encoded only once.
    entering = memory.requires_grad_()
    hidden, next_memory, auxiliary = work.encode(last, entering)
    hiddens.append(hidden.detach())
    last_memory = next_memory.detach()
    read_out(last_chunk)

    after = capture_randomness(device)
    auxiliary_grad = work.auxiliary_scales(total_nll)
    if last == 0:
        work.before_last_backward()
    _backward((hidden, hidden_grads.pop()), (auxiliary, auxiliary_grad))
    memory_grad = _grad_of(entering)
    norms = [memory_grad.norm()]
    for timestep in reversed(range(last)):
        # Free the graph of the current timestep before building that of the previous one.
        del hidden, next_memory, auxiliary, entering
        restore_randomness(randomness.pop(), device=device)
        entering = replay_buffer.pop().requires_grad_()
        hidden, next_memory, auxiliary = work.encode(timestep, entering)
        if timestep == 0:
            work.before_last_backward()
        _backward((hidden, hidden_grads.pop()), (next_memory, memory_grad), (auxiliary, auxiliary_grad))
        memory_grad = _grad_of(entering)
        norms.append(memory_grad.norm())
    restore_randomness(after, device=device)
    return total_nll, last_memory, memory_grad, torch.stack(norms[::-1])


def _backward(*outputs_and_grads: tuple[Tensor, Tensor | None]) -> None:
    """Back-propagate from several outputs at once, ignoring those without a gradient or a graph."""
    differentiable = [(output, grad) for output, grad in outputs_and_grads if output.requires_grad and grad is not None]
    if differentiable:
        outputs, grads = zip(*differentiable, strict=True)
        torch.autograd.backward(outputs, grads)


def _grad_of(memory: Tensor) -> Tensor:
    return torch.zeros_like(memory) if memory.grad is None else memory.grad
