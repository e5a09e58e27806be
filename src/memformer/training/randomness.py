"""Capture and restore random generator states, so that a recomputed forward pass draws the same dropout masks."""

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def capture_randomness(device: torch.device) -> RandomState:
    """Return the states of the random generators used by a model on `device`: the CPU's, and another device's or None.

    Known to work for CPU and CUDA; for other devices (MPS, XPU) it follows PyTorch's interface, untried.
    """
    state = None
    if device.type != "cpu":
        state = torch.get_device_module(device).get_rng_state(*_named(device))
    return torch.get_rng_state(), state


def restore_randomness(state: RandomState, *, device: torch.device) -> None:
    """Restore the random generator states returned by `capture_randomness`."""
    cpu_state, device_state = state
    torch.set_rng_state(cpu_state)
    if device_state is not None:
        torch.get_device_module(device).set_rng_state(device_state, *_named(device))


def _named(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one, and its functions take no device


class Randomness:
    """The random generator of one device, set back to earlier points of its own sequence.

    On CUDA a point is an offset, which a recorded graph reads when it is launched.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generator = torch.cuda.default_generators[index]

    def capture(self) -> Tensor | int:
        """Return the current point."""
        return torch.get_rng_state() if self._generator is None else self._generator.get_offset()

    def restore(self, point: Tensor | int) -> None:
        """Go back (or forward) to a point that `capture` returned."""
        if isinstance(point, Tensor):
            torch.set_rng_state(point)
        else:
            assert self._generator is not None
            self._generator.set_offset(point)
