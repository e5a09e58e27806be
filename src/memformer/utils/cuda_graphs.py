"""CUDA graphs: work on static tensors that is recorded once and launched as a whole.

On a GPU, a small model waits for its launches: each operation costs the host some microseconds, whatever its size. A
graph launches hundreds of operations at once. It always works on the same tensors, so inputs are copied into them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[], None]

# Runs before recording, so that libraries choose their kernels and allocate their workspaces outside the graph.
_WARM_UP_RUNS = 3


class CannotRecord(RuntimeError):
    """The work cannot become a graph, because it waits for the device or needs a shape that depends on values."""


class GraphPool:
    """Graphs of one device that share their memory; they must not run at the same time.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work, *, before: Work) -> Work:
        """Return a function that launches `work` as one graph.

        Args:
            work: Operations on static tensors. It is run several times.
            before: Called before each run of `work`; sets the static tensors to values with which it can run.

        Raises:
            CannotRecord: The work synchronizes the device, or recording fails for another reason.
        """
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            before()
            work()  # may compile, and choosing kernels synchronizes
            for _ in range(_WARM_UP_RUNS - 1):
                before()
                with _synchronizing_refused():
                    work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        before()
        graph = torch.cuda.CUDAGraph()
        with self._generator_kept(), torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay

    @contextmanager
    def _generator_kept(self) -> Iterator[None]:
        """Give the random generator its state back if recording fails: it would still wait for the end of recording.

        Raises:
            CannotRecord: Recording failed.
        """
        generator = torch.cuda.default_generators[self.device.index or 0]
        before = generator.clone_state()
        try:
            yield
        except RuntimeError as error:
            generator.graphsafe_set_state(before)
            raise CannotRecord(str(error).splitlines()[0]) from error


@contextmanager
def _synchronizing_refused() -> Iterator[None]:
    """Turn synchronization into an error before recording: an error during it would spoil the random generator.

    Raises:
        CannotRecord: The device was synchronized.
        RuntimeError: The work failed for another reason.
    """
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CannotRecord(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
