"""Measures the time and the peak memory growth of one update, in a separate process."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memformer.errors import InputError
from memformer.models import LanguageModel, build_model
from memformer.models.loading import MODELS
from memformer.rollout import Rollout
from memformer.training.replay import backpropagate
from memformer.utils.machine import choose_device

# On Linux, writing 5 to it resets the peak of the resident memory.
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and the size of the rollout of random tokens that it is trained on.

    Attributes:
        model_type: Type of the model.
        model: Config of the model.
        batch_size: Rows of the rollout.
        num_timesteps: Timesteps of the rollout.
        device: auto, cpu, cuda, ...
        threads: Threads on a CPU.
    """

    model_type: str
    model: dict[str, Any]
    batch_size: int
    num_timesteps: int
    device: str = "auto"
    threads: int = 1


class MethodSpec(NamedTuple):
    """A training method: the arguments `method` and `readout_timesteps` of `backpropagate`."""

    method: str
    readout_timesteps: int = 1


def measure_seconds(setting: Setting, methods: Sequence[MethodSpec], *, rounds: int) -> dict[MethodSpec, list[float]]:
    """Return the seconds of forward and backward pass per round, for every method.

    The methods alternate in one process, so that changes in machine load affect all of them.

    Raises:
        InputError: The measuring process failed.
    """
    found: list[list[float]] = _run_child({"setting": asdict(setting), "methods": methods, "rounds": rounds})
    return dict(zip(methods, found, strict=True))


def measure_growth(setting: Setting, method_spec: MethodSpec) -> int:
    """Return the peak memory growth of one update in bytes: resident memory on a CPU, else device memory.

    Raises:
        InputError: The measuring process failed; on a CPU, the measurement needs Linux.
    """
    growth: int = _run_child({"setting": asdict(setting), "methods": [method_spec], "rounds": None})
    return growth


def _run_child(task: dict[str, Any]) -> Any:
    return run_child("memformer.reproduction.measure", task, subject=task["setting"]["model_type"])


def run_child(module: str, task: dict[str, Any], *, subject: str) -> Any:
    """Return what a new process measures: it runs a module, which reads a task as JSON and prints the result as JSON.

    Args:
        module: The module.
        task: The task. If its `rounds` are None, it measures memory.
        subject: What is measured, for the message.

    Raises:
        InputError: The process failed.
    """
    environment = dict(os.environ)
    if task["rounds"] is None:
        # Freed tensors are returned to the system at once, so that the peak does not include memory cached by the
        # allocator. This takes time, so it is not done when timing.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, input=json.dumps(task), check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise InputError(f"measuring {subject} failed: {last[0]}")
    return json.loads(done.stdout)


def check_growth_is_measurable(device: str) -> None:
    """Check, before anything else is done, that this machine measures the peak memory growth on a device.

    Raises:
        InputError: It does not, or it does not have the device.
    """
    if choose_device(device).type != "cuda" and not _RESET_PEAK.exists():
        raise InputError(f"the growth of memory on a CPU is measured on Linux only: there is no {_RESET_PEAK}")


def _measure_seconds(
    model: LanguageModel, rollout: Rollout, methods: Sequence[MethodSpec], rounds: int
) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in methods]
    for count in range(rounds + 1):
        for method_spec, own in zip(methods, seconds, strict=True):
            model.zero_grad()
            taken = seconds_of(model.device, partial(backpropagate, model, rollout, **method_spec._asdict()))
            if count:  # the first round warms up
                own.append(taken)
    return seconds


def growth_of_update(model: LanguageModel, rollout: Rollout, method_spec: MethodSpec) -> int:
    """Return the peak memory growth of one update in this process, in bytes; on a CPU, it must be a new process."""
    first = Rollout(inputs=rollout.inputs[:1, :1], targets=rollout.targets[:1, :1])
    backpropagate(model, first, **method_spec._asdict())  # loads kernels and allocates the gradients
    return peak_growth(model.device, lambda: backpropagate(model, rollout, **method_spec._asdict()))


def peak_growth(device: torch.device, action: Callable[[], object]) -> int:
    """Return the peak memory growth during an action in bytes: resident memory on a CPU (Linux), else device memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    _RESET_PEAK.write_text("5", encoding="ascii")
    before = _resident_bytes("VmRSS")
    action()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def seconds_of(device: torch.device, action: Callable[[], object]) -> float:
    """Return the seconds that an action takes, from and to the time at which the device has done all its work."""
    _wait_for(device)
    started = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(setting: Setting) -> tuple[LanguageModel, Rollout]:
    """Return the model and the rollout of random tokens, on the device.

    Raises:
        InputError: The config is invalid, or this machine does not have the device.
    """
    device = choose_device(setting.device)
    torch.manual_seed(0)
    config = MODELS[setting.model_type].config_class.from_dict(setting.model)
    model = build_model(config).to(device)
    shape = (setting.num_timesteps, setting.batch_size, config.segment_length)
    inputs, targets = torch.randint(0, config.vocab_size, (2, *shape)).to(device)
    return model, Rollout(inputs=inputs, targets=targets)


def perform(task: dict[str, Any]) -> Any:
    """Return what a task measures, in this process: the seconds of each method, or bytes.

    Raises:
        InputError: The config is invalid, or this machine does not have the device.
    """
    setting = Setting(**task["setting"])
    methods = [MethodSpec(*method_spec) for method_spec in task["methods"]]
    if choose_device(setting.device).type == "cpu":
        torch.set_num_threads(setting.threads)
    model, rollout = build(setting)
    if task["rounds"] is None:
        return growth_of_update(model, rollout, methods[0])
    return _measure_seconds(model, rollout, methods, task["rounds"])


if __name__ == "__main__":
    print(json.dumps(perform(json.load(sys.stdin))))
