"""What one update costs, measured in a process of its own: seconds, and by how much memory grows at its peak."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memformer.errors import InputError
from memformer.models import LanguageModel, build_model
from memformer.models.loading import MODELS
from memformer.rollout import Rollout
from memformer.training.replay import backpropagate
from memformer.utils.machine import choose_device


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A rollout of random tokens, and the model that is trained on it.

    Attributes:
        model_type: Type of the model.
        model: Its config.
        batch_size: Rows.
        num_timesteps: Segments of the rollout.
        device: auto, cpu, cuda, ...
        threads: Of a CPU.
    """

    model_type: str
    model: dict[str, Any]
    batch_size: int
    num_timesteps: int
    device: str = "auto"
    threads: int = 1


class Way(NamedTuple):
    """A way to compute an update: `backpropagate`'s method, and how many timesteps it reads out together."""

    method: str
    readout_timesteps: int = 1


def measure_seconds(setting: Setting, ways: Sequence[Way], *, rounds: int) -> dict[Way, list[float]]:
    """Return the seconds of forward and backward for every way, round after round: they take turns in one process.

    Raises:
        InputError: The process failed.
    """
    found: list[list[float]] = _run_child({"setting": asdict(setting), "ways": ways, "rounds": rounds})
    return dict(zip(ways, found, strict=True))


def measure_growth(setting: Setting, way: Way) -> int:
    """Return by how many bytes memory grows at the peak of one update: the process's on a CPU, else the device's.

    Raises:
        InputError: The process failed, or a CPU's peak cannot be measured on this system (it needs Linux).
    """
    growth: int = _run_child({"setting": asdict(setting), "ways": [way], "rounds": None})
    return growth


def _run_child(task: dict[str, Any]) -> Any:
    environment = dict(os.environ)
    if task["rounds"] is None:
        # Freed tensors go back to the system at once: what is counted is what is held, not what the allocator keeps.
        # That costs time, so what is timed goes without.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "memformer.reproduction.measure"]
    done = subprocess.run(command, input=json.dumps(task), check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise InputError(f"measuring {task['setting']['model_type']} failed: {last[0]}")
    return json.loads(done.stdout)


def _measure_seconds(model: LanguageModel, rollout: Rollout, ways: Sequence[Way], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in ways]
    for count in range(rounds + 1):
        for way, own in zip(ways, seconds, strict=True):
            model.zero_grad()
            _wait(model.device)
            started = time.perf_counter()
            backpropagate(model, rollout, **way._asdict())
            _wait(model.device)
            if count:  # the first round warms up
                own.append(time.perf_counter() - started)
    return seconds


def _measure_growth(model: LanguageModel, rollout: Rollout, way: Way) -> int:
    first = Rollout(inputs=rollout.inputs[:1, :1], targets=rollout.targets[:1, :1])
    backpropagate(model, first, **way._asdict())  # loads kernels and makes the gradients
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        backpropagate(model, rollout, **way._asdict())
        return torch.cuda.max_memory_allocated(model.device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _resident_bytes("VmRSS")
    backpropagate(model, rollout, **way._asdict())
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _main() -> None:
    task = json.load(sys.stdin)
    setting = Setting(**task["setting"])
    ways = [Way(*way) for way in task["ways"]]
    device = choose_device(setting.device)
    if device.type == "cpu":
        torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    config = MODELS[setting.model_type].config_class.from_dict(setting.model)
    model = build_model(config).to(device)
    shape = (setting.num_timesteps, setting.batch_size, config.segment_length)
    inputs, targets = torch.randint(0, config.vocab_size, (2, *shape)).to(device)
    rollout = Rollout(inputs=inputs, targets=targets)
    if task["rounds"] is None:
        print(json.dumps(_measure_growth(model, rollout, ways[0])))
    else:
        print(json.dumps(_measure_seconds(model, rollout, ways, task["rounds"])))


if __name__ == "__main__":
    _main()
