"""Work of a process of a job: updates of a model, whose result the first process writes."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memformer import Memformer
from memformer.training import loop
from memformer.training.config import RunConfig
from memformer.training.engine import ReplayEngine
from memformer.training.logs import RunLog
from memformer.training.processes import Processes, processes_started
from memformer.training.run_data import prepare_data
from tests.training.runs import run_config


def main(base: Path, target: Path, method: str, sharding: str, precision: str = "float64") -> None:
    """Make two updates of two rollouts each; write the gradients of the second update and the memory of all lanes.

    The precision is that of the weights, or "bfloat16" for mixed precision. In float64, unsharded replay is run by the
    engine as well, in operations; its tensors have names of their own.
    """
    torch.set_num_threads(1)
    mixed = {"precision": precision} if precision == "bfloat16" else {}
    config = run_config(base, num_lanes=4, method=method, sharding=sharding, **mixed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    with processes_started("cpu") as processes:
        tensors = updates(config, processes, by_engine=False)
        if (method, sharding, precision) == ("replay", "none", "float64"):
            by_engine = updates(config, processes, by_engine=True)
            tensors.update({f"engine: {name}": tensor for name, tensor in by_engine.items()})
        if processes.is_first:
            save_file(tensors, target)


def updates(config: RunConfig, processes: Processes, *, by_engine: bool) -> dict[str, Tensor]:
    """Make the updates and check the number of collective operations; return the gradients and the memory."""
    sharding = config.training.sharding
    torch.manual_seed(0)
    model = Memformer(config.model)
    if config.training.precision == "float32":
        model = model.double()
    trainer = loop._Trainer(config, prepare_data(config.data), model, resume=False, processes=processes)
    if by_engine:
        trainer.engine = ReplayEngine(model, records=False)
    trainer._update(RunLog(), [])
    gradients: dict[str, Tensor] = {}
    trainer.state.optimizer.step = lambda: gradients.update(
        {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    )
    with Exchanges() as exchanges:
        trainer._update(RunLog(), [])
    memory = processes.gather_lanes(trainer.state.memory)
    names = ("allreduce_", "_reduce_scatter_base_", "_allgather_base_")
    found = [exchanges.counts[f"c10d::{name}"] for name in names]
    if sharding == "none":
        assert found == [int(processes.count > 1), 0, 0], found
    else:
        # One all-reduce for the loss. Reduce-scatters for the gradients of two layers and of the rest; the rest is
        # reduced twice because lanes are reset.
        assert found[:2] == [1, 4], found
        # All-gathers of the same weights: once per update, or at each use.
        assert found[2] == 3 if sharding == "optimizer_state" else found[2] > 30, found
    return {**gradients, "memory": memory}


class Exchanges(TorchDispatchMode):
    """Counts the collective operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in {"c10d", "_c10d_functional"}:
            self.counts[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def whole(gradient):
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
