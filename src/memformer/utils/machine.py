"""The machine that a run is on: its devices, its memory, the versions of what it runs with."""

import importlib.metadata
import os
import platform
import sys

import torch

from memformer.errors import InputError


def choose_device(name: str) -> torch.device:
    """Return the device of a name; auto is CUDA where there is one, else the CPU.

    Of several processes on a machine each takes the CUDA device of its number among them, unless the name has one.

    Raises:
        InputError: The name is unknown, or there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise InputError(f"device ({name!r}) must be auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device ({name!r}) is not there: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the device for CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Each system has its own way, and psutil reads a process's peak on Windows alone.
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a result."""
    packages = ("memformer-lm", "torch", "numpy", "safetensors", "tokenizers")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {
        **found,
        "torch build": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
