"""Describe the machine of a measurement, and read the memory use of this process."""

import argparse
import platform
import subprocess
from pathlib import Path
from typing import Any

from memformer.utils.machine import versions


def describe_machine(cores_used: int) -> dict[str, Any]:
    """Return the processor, versions and commit to store with a result."""
    return {"processor": processor_name(), "cores_used": cores_used, "versions": versions(), "commit": commit()}


def processor_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """Return the checked-out commit, marked as dirty if the working tree has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def positive(text: str) -> int:
    """Return the value of an option that must be an integer of at least 1; as a `type` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def memory_mib(field: str) -> float:
    """Return the memory use of this process on Linux: VmRSS is the present value, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status; memory is measured on Linux only")
