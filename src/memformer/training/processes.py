"""Several processes that train one model: each reads some of the lanes, and gradients are summed once an update.

Every process deals all documents to all lanes, as one process would, and keeps its own lanes. So what is trained on
does not depend on the number of processes, nor does the update, but for rounding and what dropout draws.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from memformer.errors import CheckpointError, InputError
from memformer.training.randomness import RandomState, capture_randomness

# Long enough for an evaluation that the others wait for; torchrun ends a job at once when one of its processes dies.
_TIMEOUT = timedelta(hours=12)


class Processes:
    """The processes of a run and this one's place among them; without `torchrun`, one alone.

    Attributes:
        count: How many there are.
        rank: Which this is, from 0; the first one evaluates, logs and saves.
    """

    def __init__(self) -> None:
        is_started = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if is_started else 1
        self.rank = dist.get_rank() if is_started else 0

    @property
    def is_first(self) -> bool:
        """Whether this process evaluates, logs and saves."""
        return self.rank == 0

    def lanes_of(self, num_lanes: int) -> list[int]:
        """Return the lanes that this process reads.

        Raises:
            InputError: They cannot be shared out evenly.
        """
        if num_lanes % self.count:
            raise InputError(f"training.num_lanes ({num_lanes}) must be a multiple of the {self.count} processes")
        share = num_lanes // self.count
        return list(range(self.rank * share, (self.rank + 1) * share))

    def sum_up(self, model: nn.Module, values: list[float]) -> list[float]:
        """Sum every gradient over the processes, in place, and some numbers with them; one reduction in all.

        Where the model is shared out its gradients are summed already, and only the numbers are left.
        """
        if self.count == 1:
            return values
        from memformer.training.sharding import is_sharded  # slow to import

        if is_sharded(model):
            numbers = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
            dist.all_reduce(numbers)
            return [float(number) for number in numbers]
        parameters = list(model.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        numbers = gradients[0].new_tensor(values)
        together = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
        dist.all_reduce(together)
        *summed, numbers = together.split([*(gradient.numel() for gradient in gradients), len(values)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        return [float(number) for number in numbers]

    def gather_lanes(self, memory: Tensor) -> Tensor:
        """Return the memory of all lanes, in their order."""
        if self.count == 1:
            return memory
        return torch.cat(self._gather(memory))

    def gather_randomness(self, device: torch.device) -> list[RandomState]:
        """Return the state of the random generators of every process."""
        own = capture_randomness(device)
        if self.count == 1:
            return [own]
        cpu_states, cuda_states = (
            [None] * self.count if state is None else [part.cpu() for part in self._gather(state.to(device))]
            for state in own
        )
        return [(cpu, cuda) for cpu, cuda in zip(cpu_states, cuda_states, strict=True) if cpu is not None]

    def check_agreement(self, model: nn.Module) -> None:
        """Check that all processes have the same weights, unless each has its own share of them.

        Raises:
            CheckpointError: They have not.
        """
        if self.count == 1:
            return
        from memformer.training.sharding import is_sharded

        if is_sharded(model):
            return
        own = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
        first, *others = self._gather(own)
        for rank, other in enumerate(others, start=1):
            if not torch.equal(other.nan_to_num(), first.nan_to_num()):
                raise CheckpointError(f"the weights of process {rank} are not those of process 0; nothing was saved")

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous())
        return parts

    def wait_for_all(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()


def exit_process(status: int) -> NoReturn:
    """End this process; one of several ends at once, without the interpreter's own shutdown.

    Where weights are shared out, torch keeps gloo's threads beyond `destroy_process_group`. One of them that lets go of
    a tensor while the interpreter shuts down aborts the process, and with it the job, though all is done and saved
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if num_started() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def num_started() -> int:
    """Return how many processes `torchrun` started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def were_restarted() -> bool:
    """Whether `torchrun --max-restarts` has started the processes again after one had died."""
    return _num_restarts() > 0


def _num_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def processes_started(device_type: str) -> Iterator[Processes]:
    """Join the other processes that `torchrun` started, if it did; leave them at the end.

    Yields:
        The processes.
    """
    if num_started() == 1 or dist.is_initialized():
        yield Processes()
        return
    store, rank, count = next(rendezvous("env://", timeout=_TIMEOUT))
    # The store outlives a restart: without a name of their own the new processes would look for the old ones' ports.
    # torch documents PrefixStore here and does not mark it as exported.
    store = dist.PrefixStore(f"attempt-{_num_restarts()}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()
