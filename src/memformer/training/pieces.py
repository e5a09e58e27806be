"""Parts that all methods of back-propagation share: pieces of forward computation, hooks and the result."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memformer.errors import InputError, InputTypeError
from memformer.models.recurrence import RecurrentModel, check_tokens, unwrapped
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.rollout import Rollout
from memformer.training.distributed_tensors import is_distributed
from memformer.utils.checks import Integer, Number, check_integer, check_number, check_type
from memformer.utils.words import with_article

NewAutocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors are not compared with ==
class RolloutResult:
    """Result of the back-propagation of one rollout.

    Attributes:
        loss: Mean negative log-likelihood per non-padding target token in nats, detached; 0 if there are no targets.
        num_tokens: Number of non-padding target tokens.
        memory: (B, K, W), the memory after the last timestep, detached.
        memory_grad: (B, K, W), d loss / d memory at the start of the rollout, scaled like the other gradients.
        memory_grad_norms: (N,), norm over all rows of d loss / d memory at the start of each timestep. It shows how far
            back the predictions depend on the memory. The first entry is the norm of `memory_grad`.
    """

    loss: Tensor
    num_tokens: int
    memory: Tensor
    memory_grad: Tensor
    memory_grad_norms: Tensor


@dataclass(frozen=True, kw_only=True)
class RolloutHooks:
    """Optional functions that `backpropagate` calls.

    Attributes:
        auxiliary_weight: Maps the rollout's loss (nats per token) to the weight of the model's auxiliary loss, a
            factor. The auxiliary loss is a mean over the rollout's non-padding input tokens. None: use
            `model.auxiliary_weight`.
        shortfall_weight: Maps the rollout's loss to the weight of the writer's shortfall (`memformer.nn.MemoryWriter`),
            which is divided by the number of these tokens. It needs an `auxiliary_weight`. None: 0.
        before_last_backward: Called once, before the last backward pass of the rollout; sharded training enables
            gradient synchronization there.

    Raises:
        InputTypeError: One of them is not a function.
    """

    auxiliary_weight: Callable[[float], float] | None = None
    shortfall_weight: Callable[[float], float] | None = None
    before_last_backward: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        for name, hook in vars(self).items():
            if hook is not None and not callable(hook):
                raise InputTypeError(f"hooks.{name} is {hook!r}; it must be a function or None")


NO_HOOKS = RolloutHooks()


def check_arguments(rollout: object, *, readout_timesteps: Integer, gradient_scale: Number) -> tuple[int, float]:
    """Return `readout_timesteps` and `gradient_scale` as plain numbers; check them, the rollout and the grad mode.

    Raises:
        InputError: As `backpropagate`.
        InputTypeError: As `backpropagate`.
    """
    check_type("rollout", rollout, Rollout)
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise InputError("gradients are disabled by torch.no_grad() or torch.inference_mode(): call outside of it")
    return (
        check_integer("readout_timesteps", readout_timesteps, 1),
        float(check_number("gradient_scale", gradient_scale)),
    )


def prepare(
    model: RecurrentModel, rollout: Rollout, memory: Tensor | None, *, hooks: RolloutHooks
) -> tuple[Rollout, Tensor]:
    """Return the rollout in the model's format and a copy of the memory, after checking them.

    Raises:
        InputError: As `backpropagate`.
        InputTypeError: As `backpropagate`.
    """
    check_type("hooks", hooks, RolloutHooks)
    if hooks.auxiliary_weight is not None:
        model.check_auxiliary_loss()
    elif hooks.shortfall_weight is not None:
        raise InputError("hooks.shortfall_weight is given without hooks.auxiliary_weight, which it needs")
    if memory is None:
        memory = model.initial_memory(rollout.batch_size)
        first = torch.zeros(rollout.inputs.shape[:2], dtype=torch.bool, device=rollout.inputs.device)
        first[0] = True
        reset = first if rollout.reset is None else rollout.reset | first
        rollout = dataclasses.replace(rollout, reset=reset)
    # Before anything is computed: a rollout that is refused later has already added a part of its gradient.
    rollout = model.align_inputs(rollout)
    check_tokens(rollout.targets.flatten(0, 1), largest=torch.iinfo(torch.int64).max, name="targets")
    model.check_memory(memory, batch_size=rollout.batch_size)
    # The only place where the gradient is cut. A clone, because requires_grad must not be set on the caller's tensor.
    return rollout, memory.detach().clone()


def trainable(model: nn.Module) -> RecurrentModel:
    """Return the model inside `torch.compile`; else the model itself.

    Raises:
        InputTypeError: It is not a recurrent model, or one whose gradients must be summed over processes or devices.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputTypeError(
            f"model is {with_article(type(model).__name__)}, which sums gradients only in its own forward and backward "
            "pass; give model.module, and sum the gradients of all processes afterwards (docs/distributed.md)"
        )
    return unwrapped(model)


def check_no_cached_weights() -> None:
    """Check that PyTorch keeps no parametrized weights: a session may have computed them, without gradient.

    Raises:
        InputError: It keeps them.
    """
    if parametrize._cache_enabled:
        raise InputError(
            "torch.nn.utils.parametrize.cached() is active, and weights in it may have been computed without "
            "gradient; call backpropagate outside of it"
        )


def check_can_replay(model: RecurrentModel) -> None:
    """Check that no hook waits for a parameter's gradient, which replay adds up in several backward passes.

    Raises:
        InputError: A parameter has such a hook.
    """
    for name, parameter in model.named_parameters():
        if not is_distributed(parameter) and (
            parameter._backward_hooks
            or getattr(parameter, "_post_accumulate_grad_hooks", None)
            or hasattr(parameter, "_in_backward_optimizers")
        ):
            raise InputError(
                f"{name} has a hook on its gradient, which memory replay would call for each part of the gradient; "
                "change gradients or weights after backpropagate, or use method 'bptt'"
            )


class BufferCheck:
    """Finds buffers that change when a model reads: replay and recomputation read twice, and must find the same.

    Args:
        model: The model, before it reads.
    """

    def __init__(self, model: RecurrentModel) -> None:
        self._found = [
            (module, f"{prefix}.{name}" if prefix else name, name, buffer, buffer._version)
            for prefix, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def __call__(self) -> None:
        """Check that no buffer has changed.

        Raises:
            InputError: One has.
        """
        for module, full_name, name, buffer, version in self._found:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                raise InputError(
                    f"the buffer {full_name} changes when the model reads, as with spectral or batch normalization "
                    "in training mode; memory replay and method 'checkpoint' read twice: use method 'bptt'"
                )


def current_autocast(device_type: str, *, cache_enabled: bool = True) -> NewAutocast:
    """Return a function that enters the autocast of the caller again.

    Args:
        device_type: Type of the device.
        cache_enabled: Whether weights are cast once until the outermost autocast ends, not at every use.
    """
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=cache_enabled and torch.is_autocast_cache_enabled(),
    )


def encode_timestep(
    model: RecurrentModel,
    segment: Tensor,
    memory: Tensor,
    *,
    reset: Tensor | None,
    padding: Tensor | None,
    is_filler: Tensor | None,
    with_auxiliary: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states (B, R, D), the next memory (B, K, W), and the auxiliary loss and the shortfall (2,).

    Raises:
        InputError: The model has an auxiliary loss, but does not compute it.
    """
    if reset is not None:
        memory = model.reset_memory(memory, reset)
    # The auxiliary loss is needed only for its gradient.
    if with_auxiliary and torch.is_grad_enabled():
        auxiliary = AuxiliaryLoss(is_filler=is_filler)
        hidden, memory = model.encode(segment, memory=memory, padding_mask=padding, auxiliary=auxiliary)
        if auxiliary.total is None:
            raise InputError(
                f"encode of {type(model).__name__} has left auxiliary.total empty; a model with an auxiliary loss must "
                "set it when it is given auxiliary"
            )
        shortfall = torch.zeros_like(auxiliary.total) if auxiliary.shortfall is None else auxiliary.shortfall
        return hidden, memory, torch.stack([auxiliary.total, shortfall])
    hidden, memory = model.encode(segment, memory=memory, padding_mask=padding)
    return hidden, memory, memory.new_zeros(2)


def has_auxiliary_loss(model: RecurrentModel, hooks: RolloutHooks) -> bool:
    """Return whether an auxiliary loss contributes to the gradient."""
    return hooks.auxiliary_weight is not None or model.auxiliary_weight != 0


def auxiliary_scales(
    model: RecurrentModel, rollout: Rollout, total_nll: Tensor, *, gradient_scale: float, hooks: RolloutHooks
) -> tuple[float, float]:
    """Return the factors on the summed auxiliary loss and shortfall, given the summed negative log-likelihood."""
    num_tokens = rollout.count_target_tokens()
    if not has_auxiliary_loss(model, hooks):
        return 0.0, 0.0
    weight, shortfall_weight = model.auxiliary_weight, 0.0
    if hooks.auxiliary_weight is not None:
        if not num_tokens:  # there is no loss by which the weight is chosen
            return 0.0, 0.0
        loss = float(total_nll) / num_tokens
        weight = _number_of("auxiliary_weight", hooks.auxiliary_weight(loss))
        if hooks.shortfall_weight is not None:
            shortfall_weight = _number_of("shortfall_weight", hooks.shortfall_weight(loss))
    scale = gradient_scale / max(rollout.count_input_tokens(), 1)
    return scale * weight, scale * shortfall_weight


def _number_of(name: str, weight: object) -> float:
    return float(check_number(f"the result of hooks.{name}", weight))


def chunks(num_timesteps: int, readout_timesteps: int) -> list[slice]:
    """Return the timesteps, grouped into chunks that are read out together.

    The last timestep is a chunk of its own, because its graph is kept, unless all timesteps fit into one chunk.
    """
    last = num_timesteps - 1
    if readout_timesteps > last:
        return [slice(0, num_timesteps)]
    starts = range(0, last, readout_timesteps)
    return [slice(start, min(start + readout_timesteps, last)) for start in starts] + [slice(last, num_timesteps)]
