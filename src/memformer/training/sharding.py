"""Sharded training with FSDP2, for models too large for one device: weights, gradients and optimizer state.

Replay makes many backward passes per update. Summing the gradients over the processes in each of them would be slow, so
unsharded gradients are accumulated until the last backward pass, which reduces them to one shard per process.

Checkpoints contain unsharded weights, which every loader can read, and a sharded optimizer state in the format of
torch.distributed.checkpoint with safetensors files (no pickle). Any number of processes can resume from them, with or
without sharding.
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
from memformer.utils.renames import TENSORS


def shard(model: Memformer, *, frees_weights: bool) -> None:
    """Shard a model over all processes, in place; all processes must have the same weights.

    Args:
        model: The unsharded model.
        frees_weights: True: gather the weights of a layer at each use and free them afterwards. False: gather them at
            their first use in an update and keep them until its end.
    """
    # FSDP2 warns that in-place operations on such views fail; this package has none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for module in [*model.encoder.layers, *model.decoder.layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=frees_weights)
    for part in _parts(model):
        # Every process scales its gradients by its share of the tokens, so gradients are summed, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reshard_after_backward(frees_weights, recurse=False)
    for layer in model.decoder.layers:
        for method in ("precompute_past", "project"):
            register_fsdp_forward_method(layer, method)
    for method in ("encode", "token_nll", "reset_memory"):
        register_fsdp_forward_method(model, method)


def disable_gradient_sync(model: torch.nn.Module) -> None:
    """Accumulate gradients locally in the following backward passes; no effect on an unsharded model."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)


def sum_gradients_in_next_backward(model: torch.nn.Module) -> None:
    """Sum all accumulated gradients over the processes in the next backward pass; no effect on an unsharded model."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)


def reshard(model: torch.nn.Module) -> None:
    """Free gathered weights except this process's shard, as the optimizer requires; no effect on an unsharded model."""
    for part in _parts(model):
        part.reshard()


def _parts(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather_model(model: LanguageModel) -> LanguageModel | None:
    """Return an unsharded copy of the model in the first process, None in the others; all processes must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not weights:
        return None
    with torch.device("meta"):
        whole = build_model(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole.to(model.device)


def scatter_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Load unsharded weights, which every process has read, into a sharded model."""
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def scatter_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a tensor sharded like a parameter; if the parameter is not sharded, return the tensor itself.

    Scalars, such as AdamW's step count, are not sharded.
    """
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def save_optimizer_state(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Write a sharded optimizer state, one file per process; all processes must call this.

    Raises:
        SaveError: Writing failed in one of the processes.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    state = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.sync_files = False  # torch fails where a mount cannot sync; `save_checkpoint` syncs the files
    try:
        save(state, storage_writer=writer)
    except CheckpointException as error:
        raise SaveError(f"cannot write the optimizer state to {folder}: {error}") from error


def load_optimizer_state(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Load a state written by `save_optimizer_state`, with any number of processes; all processes must call this.

    The model may be sharded or not.

    Raises:
        CheckpointError: The state belongs to another model, or cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for name in reader.read_metadata().state_dict_metadata:
        old_name = name.rpartition(".")[0]
        parameter = parameters.get(TENSORS.get(old_name, old_name))
        if parameter is None:
            raise CheckpointError(f"{folder} holds {name!r}, which belongs to no weight of this model")
        # AdamW's step counts are scalars, which are not sharded.
        is_count = name.endswith(".step")
        state[name] = torch.zeros((), device=parameter.device) if is_count else torch.zeros_like(parameter).detach()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended with one process
            load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"the optimizer state in {folder} cannot be read: {error}") from error
    optimizer.state.clear()
    for name, value in state.items():
        parameter_name, _, key = name.rpartition(".")
        optimizer.state[parameters[TENSORS.get(parameter_name, parameter_name)]][key] = value
