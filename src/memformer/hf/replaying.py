"""Memory replay as one differentiable function: its forward pass computes the gradients, its backward hands them out.

The parameters of the model are replaced for the time of the computation by leaves that share their values. Nothing
outside can see a gradient arise before the loss's own backward pass: gradients that were accumulated before stay, and
the hooks of `DistributedDataParallel` are not called early.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.models import LanguageModel
from memformer.rollout import Rollout
from memformer.training.replay import backpropagate


def replayed_loss(model: LanguageModel, rollout: Rollout, *, scale: float, owner: nn.Module) -> Tensor:
    """Return the mean loss of a rollout in nats per target, times `scale`; its gradients come from memory replay.

    Args:
        model: The model.
        rollout: The rollout.
        scale: Factor of the loss.
        owner: Module that holds the model, and perhaps parameters that hooks of the model use.
    """
    parameters = [parameter for parameter in owner.parameters() if parameter.requires_grad]
    loss: Tensor = _Replay.apply(model, rollout, scale, owner, *parameters)
    return loss


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: LanguageModel, rollout: Rollout, scale: float, owner: nn.Module, *parameters: Tensor
    ) -> Tensor:
        with torch.enable_grad(), leaves_in_place(owner) as leaves:
            result = backpropagate(model, rollout, gradient_scale=scale)
        # Not by `save_for_backward`: the gradients are no inputs or outputs of this function.
        ctx.grads = [leaves[parameter].grad for parameter in parameters]
        return result.loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise InputError(
                "memory replay has no second derivatives (create_graph=True); compute a loss from the logits, which "
                "forward returns without labels, inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        (factor,) = grad_outputs
        grads = [None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.grads]
        return None, None, None, None, *grads


@contextlib.contextmanager
def leaves_in_place(model: nn.Module) -> Iterator[dict[Tensor, nn.Parameter]]:
    """Replace the parameters of a model, inside a `with` block, by new leaves with the same storage.

    Yields:
        The leaf of each parameter.
    """
    leaves: dict[Tensor, nn.Parameter] = {}
    replaced = [(module, name, each) for module in model.modules() for name, each in module._parameters.items()]
    try:
        for module, name, parameter in replaced:
            if parameter is not None:
                if parameter not in leaves:
                    leaves[parameter] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = leaves[parameter]
        yield leaves
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
