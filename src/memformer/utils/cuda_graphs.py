"""CUDA graphs: work on static tensors that is recorded once and launched as a whole.

On a GPU, a small model waits for its launches: each operation costs the host some microseconds, whatever its size. A
graph launches hundreds of operations at once. It always works on the same tensors, so inputs are copied into them.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from memformer.errors import first_line

Work = Callable[[], None]

# Runs before recording, so that libraries choose their kernels and allocate their workspaces outside the graph.
_WARM_UP_RUNS = 3


class CannotRecord(RuntimeError):
    """The work cannot become a graph, because it waits for the device: it may need a shape that depends on values."""


class RecordingFailed(RuntimeError):
    """Recording broke off. If the device had enough memory, graphs recorded earlier draw wrong random numbers now."""


@contextmanager
def out_of_memory_ends_recording() -> Iterator[None]:
    """Treat too little memory while graphs are prepared as a failed recording.

    Raises:
        RecordingFailed: The device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecordingFailed(first_line(error)) from error


# Everything that a thread launches on the stream of a recording would become a part of its graph.
_one_at_a_time = threading.RLock()


@cache
def _stream_for_recording(device: torch.device) -> torch.cuda.Stream:
    """Return a stream for warming up and recording: libraries keep a workspace for every stream that they work on."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Graphs of one device that share their memory; they must not run at the same time.

    Args:
        device: A CUDA device.

    Attributes:
        num_failures: How many recordings have failed in this process. Graphs that draw random numbers and were recorded
            before the last failure must not be launched any more.
    """

    num_failures = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream_for_recording(device)

    def record(self, work: Work, *, before: Work) -> Work:
        """Return a function that launches `work` as one graph.

        Args:
            work: Operations on static tensors. It is run several times.
            before: Called before each run of `work`; sets the static tensors to values with which it can run.

        Raises:
            CannotRecord: The work synchronizes the device; this is noticed before recording.
            RecordingFailed: Recording failed for another reason, such as too little memory.
        """
        # Graphs are recorded on the current device, which need not be the model's.
        with _one_at_a_time, torch.cuda.device(self.device):
            with out_of_memory_ends_recording():
                self._warm_up(work, before)
            before()
            return self._record(work)

    def _record(self, work: Work) -> Work:
        """Record the work.

        Raises:
            RecordingFailed: Recording failed.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # When a recording fails, torch leaves the stream of the recording as the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, self._pool, self._stream):
                work()
        except RuntimeError as error:
            GraphPool.num_failures += 1
            self._clean_up()
            raise RecordingFailed(first_line(error)) from error
        return graph.replay

    def _clean_up(self) -> None:
        """Undo what torch leaves behind when a recording fails: allocations still go to the graph's memory."""
        with suppress(RuntimeError):  # a newer torch has done this itself
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        # The random generator still waits for the end of the recording; one that succeeds sets it free.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            torch.zeros(1, device=self.device)

    def _warm_up(self, work: Work, before: Work) -> None:
        """Run the work as recording will, without recording.

        Raises:
            CannotRecord: The work synchronizes the device.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                before()
                work()  # may compile, and choosing kernels synchronizes
                for _ in range(_WARM_UP_RUNS - 1):
                    before()
                    with _synchronizing_refused():
                        work()
        finally:  # the caller goes on with the same tensors
            torch.cuda.current_stream().wait_stream(self._stream)


@contextmanager
def _synchronizing_refused() -> Iterator[None]:
    """Turn synchronization into an error, before recording.

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
        raise CannotRecord(first_line(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
