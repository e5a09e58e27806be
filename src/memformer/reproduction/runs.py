"""The runs of a table: missing runs are trained, interrupted runs are resumed, finished runs are reused."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memformer.errors import InputError
from memformer.reproduction.tables import Row, Table
from memformer.training.checkpoint import checkpoints_newest_first
from memformer.training.logs import read_log
from memformer.training.run_folder import CHECKPOINTS, RESULT_FILE, TRAIN_LOG
from memformer.utils.files import read_json, write_text


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run of one row with one seed.

    Attributes:
        row: The row.
        seed: The seed.
        folder: The run folder.
        config: The config for `memformer train`.
    """

    row: Row
    seed: int
    folder: Path
    config: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained to its end and evaluated."""
        return (self.folder / RESULT_FILE).is_file()

    def result(self) -> dict[str, Any]:
        """Return the final evaluation, with the number of training tokens and the training time in seconds.

        Raises:
            CheckpointError: A file of the run is missing or damaged.
        """
        training = [line for line in read_log(self.folder) if line["kind"] == "training"][-1]
        return {
            **read_json(self.folder / RESULT_FILE),
            "tokens_trained": training["num_tokens"],
            "training_seconds": training["seconds"],
        }


def plan_runs(
    table: Table, rows: Sequence[Row], *, scale: str, seeds: Sequence[int], folder: Path, data: str
) -> list[Run]:
    """Return the runs of all rows with the first seed, followed by those with the next seed, and so on.

    Raises:
        InputError: A row does not have this scale.
    """
    configs = {row.key: table.config_of(row, scale, data=data) for row in rows}
    return [
        Run(row=row, seed=seed, folder=folder / f"{row.key}-seed-{seed}", config=configs[row.key])
        for seed in seeds
        for row in rows
    ]


def finish_runs(runs: Sequence[Run], *, jobs: int, options: Sequence[str], say: Callable[[str], None]) -> None:
    """Train or resume all unfinished runs.

    Args:
        runs: The runs, in training order.
        jobs: Number of runs to train in parallel, each in its own process.
        options: Additional options of `memformer train`, for every run.
        say: Called with a message when a run starts and when it ends.

    Raises:
        InputError: Some runs failed; the others are finished.
        SaveError: A config cannot be written.
    """
    missing = [run for run in runs if not run.is_finished]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished")
    with ThreadPoolExecutor(jobs) as pool:
        endings = list(pool.map(lambda run: _train(run, options, say), missing))
    if failed := [str(run.folder) for run, ending in zip(missing, endings, strict=True) if ending != 0]:
        raise InputError(
            f"{len(failed)} runs failed, the first in {failed[0]}; the output of a run is in {TRAIN_LOG} in its folder"
        )


def _train(run: Run, options: Sequence[str], say: Callable[[str], None]) -> int:
    config = run.folder.with_name(f"{run.folder.name}.yaml")
    write_text(config, yaml.safe_dump(run.config, sort_keys=False))
    command = [sys.executable, "-m", "memformer", "train", str(config)]
    command += ["--folder", str(run.folder), "--seed", str(run.seed), *options]
    if any(checkpoints_newest_first(run.folder / CHECKPOINTS)):
        command.append("--resume")
    say(f"{run.row.name}, seed {run.seed}: started")
    run.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (run.folder / TRAIN_LOG).open("a", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    minutes = (time.monotonic() - started) / 60
    say(f"{run.row.name}, seed {run.seed}: {'done' if status == 0 else f'failed ({status})'} in {minutes:.1f} min")
    return status
