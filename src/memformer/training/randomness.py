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
