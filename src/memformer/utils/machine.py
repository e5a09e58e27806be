"""Properties of the machine: devices, peak memory, versions of the installed packages."""

import importlib.metadata
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from memformer.errors import InputError, first_line
from memformer.utils.progress import print_warning


def choose_device(name: str) -> torch.device:
    """Return the torch device of a name; auto means CUDA if available, else the CPU.

    With several processes per machine, "cuda" without an index means the CUDA device whose index is the process's
    `LOCAL_RANK`. A CUDA device with an index becomes torch's current one. If auto cannot use a CUDA device, for example
    because its driver is too old, a warning says so.

    Raises:
        InputError: The name is unknown, or this machine does not have the device.
    """
    if name == "auto":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and caught:
            print_warning(f"the CPU is used: {_first_sentence(caught[0].message)}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise InputError(f"device ({name!r}) must be auto, cpu, cuda, cuda:0, ...")
    check_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # libraries, and torch where no device is named, use the current one
    return device


def check_device(device: torch.device | str) -> None:
    """Check that torch knows a device and, if it is a CUDA device, that this machine has it.

    Raises:
        InputError: The name is unknown, or this machine does not have the device.
    """
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device ({device!r}) is not known: {_first_sentence(error)}") from error
    if known.type == "cuda" and (not torch.cuda.is_available() or (known.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device ({str(known)!r}) is not available: {_why_there_is_no_cuda()}")


def _why_there_is_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, or a torch without CUDA
        return _first_sentence(error)
    return f"torch finds {torch.cuda.device_count()} CUDA devices"


def _first_sentence(message: object) -> str:
    return first_line(message).split(". ")[0].rstrip(".")


@contextmanager
def device_memory_explained(advice: str) -> Iterator[None]:
    """Say what to do if the device has too little memory for the work in the `with` block.

    Yields:
        Nothing.

    Raises:
        InputError: There is too little memory; the message has torch's figures and the advice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"the device has too little memory: {first_line(error)} {advice}") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes: allocated on the device for CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Every system has its own API; psutil reports the peak of a process on Windows only.
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", _system_text("/proc/self/status"), re.MULTILINE):  # on Linux
        return int(found[1]) * 1024
    import resource

    # On Linux, where a system has no such file, this may be the peak of the process that began this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@lru_cache(maxsize=1)
def has_intel_processor() -> bool:
    """Return whether this machine's processor is made by Intel."""
    if sys.platform == "darwin":
        return platform.machine() == "x86_64"
    # The name of the processor names the vendor on Windows.
    return "GenuineIntel" in (_system_text("/proc/cpuinfo") or platform.processor())


def _system_text(path: str) -> str:
    """Return the text of a file of the system; empty if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def version_of(package: str) -> str:
    """Return the version of a package; "not installed" if it is imported from its source, as this one can be."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of all packages that can change a result, of Python and of the platform."""
    packages = ("memformer-lm", "torch", "numpy", "safetensors", "tokenizers")
    return {
        **{package: version_of(package) for package in packages},
        "torch build": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
