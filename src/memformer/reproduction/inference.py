"""Measures the time and the peak memory growth of inference by trained models, in separate processes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memformer.generation.session import Session
from memformer.models import LanguageModel, load_model
from memformer.reproduction.measure import peak_growth, run_child, seconds_of
from memformer.utils.machine import choose_device


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The amount that the models read and generate when they are measured.

    Attributes:
        streams: Token streams that are scored side by side; one stream is generated.
        tokens: Tokens of each stream. They are random: the cost does not depend on them.
        device: auto, cpu, cuda, ...
        threads: Threads on a CPU. None: torch's default.
    """

    streams: int
    tokens: int
    device: str = "auto"
    threads: int | None = 1


class Times(NamedTuple):
    """Seconds per token in every round."""

    evaluation: list[float]
    generation: list[float]


def measure_times(folders: Sequence[Path], workload: Workload, *, rounds: int) -> list[Times]:
    """Return the times of evaluation (`Session.score`) and generation (`Session.generate`) of every model.

    The models take turns in one process, so that changes in machine load affect all of them.

    Args:
        folders: Folder of each model, as from `save_pretrained`.
        workload: What the models read and generate.
        rounds: Number of timed rounds, after one that warms up and fills the memories.

    Raises:
        InputError: The measuring process failed.
    """
    task = {"folders": [str(folder) for folder in folders], "workload": asdict(workload), "rounds": rounds}
    return [Times(*times) for times in _run_child(task)]


def measure_inference_growth(folder: Path, workload: Workload) -> int:
    """Return the peak memory growth in bytes while new streams are scored: resident memory on a CPU, else the device's.

    It includes the state of the streams, but not the weights.

    Raises:
        InputError: The measuring process failed; on a CPU, the measurement needs Linux.
    """
    growth: int = _run_child({"folders": [str(folder)], "workload": asdict(workload), "rounds": None})
    return growth


def _run_child(task: dict[str, Any]) -> Any:
    return run_child("memformer.reproduction.inference", task, subject=f"inference of {', '.join(task['folders'])}")


def perform(task: dict[str, Any]) -> Any:
    """Return what a task measures, in this process: the times of each model, or bytes.

    Raises:
        CheckpointError: A model is missing or damaged.
        InputError: This machine does not have the device.
    """
    workload = Workload(**task["workload"])
    device = choose_device(workload.device)
    if device.type == "cpu" and workload.threads is not None:
        torch.set_num_threads(workload.threads)
    models = [load_model(folder, device=device) for folder in task["folders"]]
    if task["rounds"] is None:
        return _growth(models[0], workload)
    return _times(models, workload, task["rounds"])


def _growth(model: LanguageModel, workload: Workload) -> int:
    token_ids = _token_ids(model, workload)
    Session(model).score(token_ids[0][: model.segment_length])  # loads kernels
    return peak_growth(model.device, lambda: Session(model, batch_size=workload.streams).score(token_ids))


def _times(models: Sequence[LanguageModel], workload: Workload, rounds: int) -> list[Times]:
    turns = [
        (model, Session(model, batch_size=workload.streams), Session(model), _token_ids(model, workload), Times([], []))
        for model in models
    ]
    for count in range(rounds + 1):
        for model, scored, generated, token_ids, times in turns:
            scoring = seconds_of(model.device, partial(scored.score, token_ids))
            writing = seconds_of(model.device, partial(generated.generate, workload.tokens, seed=count))
            if count:  # the first round warms up
                times.evaluation.append(scoring / (workload.streams * workload.tokens))
                times.generation.append(writing / workload.tokens)
    return [times for *_, times in turns]


def _token_ids(model: LanguageModel, workload: Workload) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = (workload.streams, workload.tokens)
    token_ids: list[list[int]] = torch.randint(0, model.vocab_size, shape, generator=generator).tolist()
    return token_ids


if __name__ == "__main__":
    print(json.dumps(perform(json.load(sys.stdin))))
