"""What `test_processes.py` starts several of: one update of a float64 model; the first one writes what came of it."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from memformer import Memformer
from memformer.training import loop
from memformer.training.logs import NoLog
from memformer.training.processes import processes_started
from memformer.training.run_data import prepare_data
from tests.training.test_loop import run_config


def main(base: Path, target: Path, method: str) -> None:
    """Make two updates of two rollouts each; write the gradients of the second one and the memory of all lanes."""
    torch.set_num_threads(1)
    reductions = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: reductions.append(tensor.numel()) or all_reduce(tensor)
    config = run_config(base, num_lanes=4, method=method)
    model_config = type(config.model)(**{**config.model.to_dict(), "dropout": 0.0})
    with processes_started("cpu") as processes:
        torch.manual_seed(0)
        model = Memformer(model_config).double()
        trainer = loop._Trainer(config, prepare_data(config.data), model, resume=False, processes=processes)
        trainer._update(NoLog(base, total_updates=2, num_updates=0), [])
        gradients = {}
        trainer.state.optimizer.step = lambda: gradients.update(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )
        trainer._update(NoLog(base, total_updates=2, num_updates=0), [])
        memory = processes.gather_lanes(trainer.state.memory)
        assert len(reductions) == (2 if processes.count > 1 else 0), reductions
        if processes.is_first:
            save_file({**gradients, "memory": memory}, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
