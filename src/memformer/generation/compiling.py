"""Functions of a model compiled by PyTorch, for reading and decoding with few rows.

With few rows, most of the time of a small model is the overhead of launching operations. Compiled code has little of
it. It holds a second copy of the weights, in a layout for products with few rows.
"""

import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memformer.errors import InputError, first_line
from memformer.generation.changed_weights import identify_weights
from memformer.utils.modules import modules_inside


class CompiledFunction:
    """A function of a model and tensors, compiled for the model, its weights and the shapes of the example.

    Args:
        function: Called with the model and then tensors; a function of a module, not a method.
        model: The model, in evaluation mode.
        example: The function's further arguments; later ones must have the same structure and shapes.

    Raises:
        InputError: PyTorch cannot compile the function, usually because there is no C++ compiler.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module, example: tuple[Any, ...]) -> None:
        # Imported here, because importing PyTorch's compiler takes a second.
        import torch._inductor.config as inductor_config
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        self._weights = identify_weights(model)
        self._modules = modules_inside(model)
        # PyTorch keeps compiled code by the function's code object. A copy of it is this model's own, so the model
        # need not be checked at every call.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        own.__kwdefaults__ = function.__kwdefaults__
        self._compiled = torch.compile(
            own,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
        )
        on_cpu = next(model.parameters()).device.type == "cpu"
        options = {"freezing": on_cpu, "cpp_wrapper": on_cpu}
        try:
            with inductor_config.patch(options), warnings.catch_warnings():
                # Raised by PyTorch's own code.
                warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
                self(model, *example)
        except InductorError as error:
            raise InputError(
                f"the model cannot be compiled: {first_line(error)}; "
                "torch needs a C++ compiler (g++ or clang); without one, use compiled=False"
            ) from error
        except TorchDynamoException as error:
            raise InputError(f"the model cannot be compiled: {first_line(error)}; use compiled=False") from error

    def __call__(self, model: nn.Module, *arguments: Any) -> Any:
        """Return the function's result; the model must be the one that it was compiled for."""
        with torch.no_grad():
            return self._compiled(model, *arguments)

    def is_stale(self, model: nn.Module) -> bool:
        """Return whether the model's weights or modules have changed since compilation."""
        return modules_inside(model) is not self._modules or identify_weights(model) != self._weights


_functions: WeakKeyDictionary[nn.Module, dict[Hashable, CompiledFunction]] = WeakKeyDictionary()


def compiled_function(
    function: Callable[..., Any], model: nn.Module, example: tuple[Any, ...], *, key: Hashable
) -> CompiledFunction:
    """Return the compiled function of a model; it is compiled once for each key and again if the weights change.

    Raises:
        InputError: PyTorch cannot compile the function.
    """
    functions = _functions.setdefault(model, {})
    if key not in functions or functions[key].is_stale(model):
        functions[key] = CompiledFunction(function, model, example)
    return functions[key]
