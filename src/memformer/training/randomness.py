"""Randomness that can be noted and replayed: recomputation must drop what the first pass dropped."""

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def capture_randomness(device: torch.device) -> RandomState:
    """Return the state of the random generators that a model on `device` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_randomness(state: RandomState, *, device: torch.device) -> None:
    """Put the generators back to where they were at `capture_randomness`."""
    cpu_state, cuda_state = state
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state, device)
