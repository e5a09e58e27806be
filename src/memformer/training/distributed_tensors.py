"""Distributed tensors and sharded models, without the import of their modules.

It would take a quarter of the start of a command.
"""

import sys
from typing import Any

from torch import Tensor, nn


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`; there is none before `memformer.training.sharding` is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, or parts of it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(part, module.FSDPModule) for part in model.modules())


def gathered(tensor: Any) -> Tensor:
    """Return a distributed tensor with the parts of all processes; another tensor as it is."""
    whole: Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return whole
