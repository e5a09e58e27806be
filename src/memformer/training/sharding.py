"""Weights, gradients and moments shared out over the processes (FSDP2): for models too large for one device.

Replay back-propagates many times an update and may not sum gradients over the processes each time: they pile up, whole,
until the last backward pass, and each process then receives the sum of its share. Checkpoints hold whole weights, which
everything that reads a model reads, and the moments as every process writes its share of them (torch's distributed
checkpoint, in safetensors files: nothing is pickled), from which any number of processes can go on, sharing or not.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from memformer.errors import CheckpointError, SaveError
from memformer.models import LanguageModel, Memformer, build_model


def shard(model: Memformer, *, frees_weights: bool) -> None:
    """Share a model out over all processes, in place; they must all have the same weights.

    Args:
        model: The model, whole.
        frees_weights: Gather a layer's weights whenever it is used and free them at once; else they are gathered at
            their first use in an update and kept until its end.
    """
    # Nothing here works in place on what a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for module in [*model.encoder.layers, *model.decoder.layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=frees_weights)
    for part in _parts(model):
        # Every process has scaled its gradients by its share of the tokens: they are summed, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reshard_after_backward(frees_weights, recurse=False)
    for layer in model.decoder.layers:
        register_fsdp_forward_method(layer, "look_back")
    for method in ("encode", "token_nats", "reset_memory"):
        register_fsdp_forward_method(model, method)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model is shared out."""
    return isinstance(model, FSDPModule)


def pile_up_gradients(model: torch.nn.Module) -> None:
    """Let the backward passes from here on keep their gradients to themselves; does nothing to a whole model."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)


def sum_gradients_in_next_backward(model: torch.nn.Module) -> None:
    """Let the next backward pass sum all gradients over the processes; does nothing to a whole model."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)


def free_weights(model: torch.nn.Module) -> None:
    """Keep this process's share of the weights alone, as the optimizer needs it; does nothing to a whole model."""
    for part in _parts(model):
        part.reshard()


def _parts(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather_model(model: LanguageModel) -> LanguageModel | None:
    """Return a copy with whole weights in the first process, None in the others; all must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not weights:
        return None
    with torch.device("meta"):
        whole = build_model(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole.to(model.device)


def scatter_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Give every process its share of whole weights, which all have read."""
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def scatter_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this process's share of a whole tensor where it goes with a parameter that is shared out, else the tensor.

    A number, as AdamW's count of steps, goes with every share.
    """
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def save_moments(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Write an optimizer's moments, every process its share; all must call it.

    Raises:
        SaveError: Writing failed in some process.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    try:
        save(moments, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise SaveError(f"cannot write the moments to {folder}: {error}") from error


def load_moments(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `save_moments` wrote, in as many processes as there are now, whole or shared out; all must call it.

    Raises:
        CheckpointError: The moments are another model's, or cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    moments: dict[str, Tensor] = {}
    for name in reader.read_metadata().state_dict_metadata:
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is None:
            raise CheckpointError(f"{folder} holds {name!r}, which belongs to no weight of this model")
        # AdamW counts its steps in a number of their own, which is not shared out.
        is_count = name.endswith(".step")
        moments[name] = torch.zeros((), device=parameter.device) if is_count else torch.zeros_like(parameter).detach()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            load(moments, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"the moments in {folder} cannot be read: {error}") from error
    optimizer.state.clear()
    for name, value in moments.items():
        parameter_name, _, key = name.rpartition(".")
        optimizer.state[parameters[parameter_name]][key] = value
