"""Capture and restore random generator states, so that a recomputed forward pass draws the same dropout masks."""

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def capture_randomness(device: torch.device) -> RandomState:
    """Return the states of the random generators used by a model on `device`: CPU, and CUDA or None."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_randomness(state: RandomState, *, device: torch.device) -> None:
    """Restore the random generator states returned by `capture_randomness`."""
    cpu_state, cuda_state = state
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state, device)


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
