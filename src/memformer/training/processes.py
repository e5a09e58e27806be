"""Data-parallel training: lanes are sharded over the processes, and gradients are summed once per update.

Every process assigns all documents to all lanes, as a single process would, and keeps only its own lanes. The training
data, and up to rounding and dropout masks the updates, therefore do not depend on the number of processes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from memformer.errors import CheckpointError, InputError, first_line
from memformer.models.baseline_configs import CompressiveTransformerConfig
from memformer.training.config import RunConfig
from memformer.training.distributed_tensors import is_sharded
from memformer.training.randomness import RandomState, capture_randomness
from memformer.utils.machine import choose_device

# Long enough for an evaluation, during which the other processes wait. If a process dies, torchrun ends the job at
# once.
_TIMEOUT = timedelta(hours=12)

# Parts of gloo's error messages after another process has died. NCCL raises no such error: it waits until torchrun ends
# this process.
_SIGNS_OF_DEATH = ("Connection closed by peer", "Connection reset by peer")

Outcome = TypeVar("Outcome")


class Processes:
    """The processes of a run and their collective operations; without `torchrun`, there is one process.

    Attributes:
        count: Number of processes (the world size).
        rank: Rank of this process, from 0. The first process evaluates, logs and saves.
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
            InputError: The number of lanes is not a multiple of the number of processes.
        """
        if num_lanes % self.count:
            raise InputError(f"training.num_lanes ({num_lanes}) must be a multiple of the {self.count} processes")
        share = num_lanes // self.count
        return list(range(self.rank * share, (self.rank + 1) * share))

    def sum_up(self, model: nn.Module, values: list[float]) -> list[float]:
        """Sum all gradients, in place, and the given values over the processes with one all-reduce; return the sums.

        A parameter that has no gradient in any process has none afterwards, as in a single process.
        The gradients of a sharded model are already summed in its backward pass; then only the values are reduced.
        """
        if self.count == 1:
            return values
        if is_sharded(model):
            numbers = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
            dist.all_reduce(numbers)
            return [float(number) for number in numbers]
        parameters = list(model.parameters())
        has_gradient = [float(parameter.grad is not None) for parameter in parameters]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        numbers = gradients[0].new_tensor([*values, *has_gradient])
        together = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
        dist.all_reduce(together)
        *summed, numbers = together.split([*(gradient.numel() for gradient in gradients), len(numbers)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        totals: list[float] = numbers.tolist()
        for parameter, number in zip(parameters, totals[len(values) :], strict=True):
            if not number:
                parameter.grad = None
        return totals[: len(values)]

    def gather_lanes(self, memory: Tensor) -> Tensor:
        """Return the memory of all lanes, in order of the lanes."""
        if self.count == 1:
            return memory
        return torch.cat(self._gather(memory))

    def gather_randomness(self, device: torch.device) -> list[RandomState]:
        """Return the random generator states of all processes, in order of rank."""
        own = capture_randomness(device)
        if self.count == 1:
            return [own]
        cpu_states, cuda_states = (
            [None] * self.count if state is None else [part.cpu() for part in self._gather(state.to(device))]
            for state in own
        )
        return [(cpu, cuda) for cpu, cuda in zip(cpu_states, cuda_states, strict=True) if cpu is not None]

    def check_agreement(self, model: nn.Module) -> None:
        """Check that all processes have the same weights; a sharded model is not checked.

        Raises:
            CheckpointError: The weights differ.
        """
        if self.count == 1:
            return
        if is_sharded(model):
            return
        own = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
        first, *others = self._gather(own)
        for rank, other in enumerate(others, start=1):
            if not torch.equal(other.nan_to_num(), first.nan_to_num()):
                raise CheckpointError(
                    f"the weights of process {rank} differ from those of process 0; nothing was saved"
                )

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous())
        return parts

    def do_in_first(self, work: Callable[[], Outcome]) -> Outcome | None:
        """Return the outcome of `work` in the first process, None in the others, which wait; all must call this.

        Raises:
            InputError: `work` raised it; only the first process raises this.
            SystemExit: `work` raised an InputError in the first process, which alone reports it.
        """
        outcome, refusal = None, None
        if self.is_first:
            try:
                outcome = work()
            except InputError as error:
                refusal = error
        if self.count > 1:
            num_refusals = torch.tensor(0 if refusal is None else 1, device=self._device)
            dist.all_reduce(num_refusals)
            if num_refusals and not self.is_first:
                raise SystemExit(2)
        if refusal is not None:
            raise refusal
        return outcome

    def from_first(self, value: Outcome | None) -> Outcome:
        """Return the value that the first process has, in every process; all must call this.

        The value is pickled, and read only by the processes of the run.
        """
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0, device=self._device)
        return cast(Outcome, values[0])

    @property
    def _device(self) -> torch.device:
        """The device on which the processes exchange what is on no device."""
        return choose_device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")

    def wait_for_all(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()


def check_processes(config: RunConfig, processes: Processes) -> None:
    """Check that a run can be trained by these processes.

    Raises:
        InputError: The number of lanes is not a multiple of the number of processes, or a loss would depend on it.
    """
    processes.lanes_of(config.training.num_lanes)
    recall, model = config.data.recall, config.model
    reconstruction_weight = 0.0
    if recall is not None and isinstance(model, CompressiveTransformerConfig) and model.compression == "convolution":
        reconstruction_weight = model.reconstruction_weight
    # Options whose effect would depend on the number of processes, and why.
    dependent = {
        "training.write_penalty": (config.training.write_penalty, "it depends on the loss of all lanes"),
        "data.recall.mine_decoys": (
            recall is not None and recall.mine_decoys,
            "all processes must find the same decoys",
        ),
        "model.reconstruction_weight": (
            reconstruction_weight,
            "processes without a question of a recall task would leave it out",
        ),
    }
    for name, (value, reason) in dependent.items():
        if value and processes.count > 1:
            raise InputError(
                f"{name} ({str(value).lower()}) needs a single process, because {reason}; there are "
                f"{processes.count} processes"
            )


def exit_process(status: int) -> NoReturn:
    """Exit this process; with several processes, skip the shutdown of the Python interpreter.

    For a sharded model, torch keeps gloo threads alive after `destroy_process_group`. If one of them releases a tensor
    while the interpreter shuts down, the process aborts and torchrun reports a failed job, although all results are
    saved (https://github.com/pytorch/pytorch/issues/190489).
    """
    if num_started() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def num_started() -> int:
    """Return the number of processes that `torchrun` started, including this one; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def were_restarted() -> bool:
    """Whether `torchrun --max-restarts` restarted the processes after one of them died."""
    return _num_restarts() > 0


def _num_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def processes_started(device_type: str) -> Iterator[Processes]:
    """Initialize the process group if `torchrun` started several processes; destroy it at the end.

    Yields:
        The processes.

    Raises:
        InputError: WORLD_SIZE is set, but not the other variables that torchrun sets; or another process has died.
        RuntimeError: It was raised inside.
    """
    if num_started() == 1 or dist.is_initialized():
        yield Processes()
        return
    try:
        store, rank, count = next(rendezvous("env://", timeout=_TIMEOUT))
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {num_started()}, so several processes should train, but {first_line(error)}; "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from error
    # The store survives a restart. Without a prefix per attempt, new processes would read the ports of the old ones.
    # torch documents PrefixStore but does not export it explicitly.
    store = dist.PrefixStore(f"attempt-{_num_restarts()}", store)  # type: ignore[attr-defined]  # missing in the stubs
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        if backend == "gloo":
            dist.barrier()  # a process that ended while another still connected to it would break the other's start
        yield Processes()
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS_OF_DEATH):
            raise
        raise InputError(
            "the connection to another process is lost: that process has died, and its own message or torchrun's "
            "report says why"
        ) from error
    finally:
        dist.destroy_process_group()
