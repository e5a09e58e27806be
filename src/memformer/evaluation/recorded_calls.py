"""Functions of a model and tensors: called as they are, or on CUDA launched as recorded graphs."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from memformer.generation.recording import record_or_run
from memformer.models.recurrence import RecurrentModel
from memformer.utils.cuda_graphs import GraphPool

Function = Callable[..., tuple[Tensor, ...]]


class RecordedCalls:
    """Calls functions of a model; on CUDA, those called often with tensors of the same shapes are launched as graphs.

    Args:
        model: The model; its weights must stay where they are.
        pool: Records the functions. None: a new pool on CUDA, and nothing is recorded on other devices.
    """

    # Recording takes as long as running the function four times; few calls are not worth it.
    CALLS_BEFORE_RECORDING = 4

    def __init__(self, model: RecurrentModel, *, pool: GraphPool | None = None) -> None:
        self._model = model
        self._pool = GraphPool(model.device) if pool is None and model.device.type == "cuda" else pool
        self._num_calls: Counter[object] = Counter()
        self._recorded: dict[object, _RecordedCall] = {}

    def __call__(self, function: Function, *arguments: Tensor | None, name: str) -> tuple[Tensor, ...]:
        """Return the function's results, which later calls do not change.

        Args:
            function: Called with the model and the arguments; its operations depend on their shapes only.
            arguments: Tensors on the model's device, or None.
            name: Name of the function for messages.
        """
        if self._pool is None:
            return function(self._model, *arguments)
        key = (function, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in arguments))
        self._num_calls[key] += 1
        if self._num_calls[key] <= self.CALLS_BEFORE_RECORDING:
            return function(self._model, *arguments)
        if key not in self._recorded:
            work = partial(function, self._model)
            self._recorded[key] = _RecordedCall(self._pool, work, arguments, name=name)
        return self._recorded[key](*arguments)


class _RecordedCall:
    """A function recorded for the shapes of its arguments.

    Arguments and results have tensors of their own outside the pool: graphs of one pool overwrite what others computed
    there.
    """

    def __init__(self, pool: GraphPool, function: Function, arguments: tuple[Tensor | None, ...], *, name: str) -> None:
        self._function = function
        self._arguments = [None if tensor is None else tensor.clone() for tensor in arguments]
        self._results = [torch.empty_like(tensor) for tensor in function(*self._arguments)]
        self._launch = record_or_run(pool, self._run, name=name)

    def _run(self) -> None:
        for static, computed in zip(self._results, self._function(*self._arguments), strict=True):
            static.copy_(computed)

    def __call__(self, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        for static, given in zip(self._arguments, arguments, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self._launch()
        return tuple(tensor.clone() for tensor in self._results)
