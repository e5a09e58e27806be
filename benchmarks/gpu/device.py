"""The device of the measurements, and what is read from its clock and its memory."""

import gc
from collections.abc import Callable

import torch

from memformer.reproduction.measure import seconds_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes on the device."""
    return seconds_of(DEVICE, work)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def reserved_mib() -> float:
    """Return the device memory that torch holds, without what it holds in reserve."""
    if DEVICE.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20
