"""The runs of an experiment: missing ones are trained, interrupted ones are resumed, finished ones are reused."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from memformer.data.files import locate_files
from memformer.errors import CheckpointError, InputError
from memformer.reproduction.child_processes import ChildProcesses
from memformer.reproduction.tables import Row, Table
from memformer.training.checkpoint import checkpoints_newest_first
from memformer.training.config import TrainingConfig
from memformer.training.logs import missing_value_sentence, read_log
from memformer.training.run_folder import CHECKPOINTS, RESULT_FILE, TRAIN_LOG
from memformer.utils.files import read_json, write_text
from memformer.utils.progress import ProgressBar
from memformer.utils.signals import Interrupted, signals_noted
from memformer.utils.yaml_files import to_yaml

SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an experiment.

    Attributes:
        name: What it trains, for messages.
        seed: The seed.
        folder: The run folder.
        config: The config for `memformer train`.
    """

    name: str
    seed: int
    folder: Path
    config: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained to its end and evaluated."""
        return (self.folder / RESULT_FILE).is_file()

    @property
    def has_begun(self) -> bool:
        """Whether the run can be continued: it has a checkpoint."""
        return any(checkpoints_newest_first(self.folder / CHECKPOINTS))

    def prepare_training(self, options: Sequence[str]) -> list[str]:
        """Write the config beside the run folder, and return the arguments of `memformer` that begin or continue it.

        Args:
            options: Additional options of `memformer train`.

        Raises:
            SaveError: The config cannot be written.
        """
        config = self.folder.with_name(f"{self.folder.name}.yaml")
        write_text(config, to_yaml(self.config))
        arguments = ["train", str(config), "--folder", str(self.folder), "--seed", str(self.seed), *options]
        return [*arguments, "--resume"] if self.has_begun else arguments

    def result(self, metric: str) -> dict[str, Any]:
        """Return the final evaluation, with the number of training tokens and the training time in seconds.

        Args:
            metric: The metric that the evaluation must have.

        Raises:
            CheckpointError: A file of the run is missing or damaged, or lacks a value.
        """
        newest = {line["kind"]: line for line in read_log(self.folder)}
        result = read_json(self.folder / RESULT_FILE)
        try:
            for memory in ("with_memory", "memory_erased"):
                if not math.isfinite(value := float(result[memory][metric])):
                    raise CheckpointError(missing_value_sentence(self.folder, f"{memory}.{metric} is {value}"))
            training = newest["training"]
            return {**result, "tokens_trained": training["num_tokens"], "training_seconds": training["seconds"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(missing_value_sentence(self.folder, error)) from error


@dataclass(frozen=True, kw_only=True)
class TableRun(Run):
    """The run of one row of a table with one seed.

    Attributes:
        row: The row.
    """

    row: Row


def plan_runs(
    table: Table, rows: Sequence[Row], *, scale: str, seeds: Sequence[int], folder: Path, data: str
) -> list[TableRun]:
    """Return the runs of all rows with the first seed, followed by those with the next seed, and so on.

    Raises:
        InputError: A row does not have this scale.
    """
    configs = {row.key: table.config_of(row, scale, data=data) for row in rows}
    return [
        TableRun(name=row.name, row=row, seed=seed, folder=folder / f"{row.key}-seed-{seed}", config=configs[row.key])
        for seed in seeds
        for row in rows
    ]


def trained_seeds(rows: Sequence[Row], folder: Path) -> list[int]:
    """Return the seeds with which a table's command trained any of the rows, in order."""
    keys = {row.key for row in rows}
    names = [file.name.rpartition("-seed-") for file in folder.glob("*-seed-*")]
    return sorted({int(seed) for key, _, seed in names if key in keys and seed.isdecimal()})


# Options of `memformer train` that differ between the runs of an experiment, and why they cannot be given for all.
_SET_FOR_EACH_RUN = {
    "--seed": "every run has its own seed (see --seeds)",
    "--folder": "every run has its own folder",
    "--resume": "runs that were begun are continued anyway",
}


def check_train_options(options: Sequence[str]) -> None:
    """Check that additional options of `memformer train` do not differ between runs.

    Raises:
        InputError: One of them does.
    """
    for option in options:
        if (name := option.partition("=")[0]) in _SET_FOR_EACH_RUN:
            raise InputError(f"{name} cannot be an option of every run: {_SET_FOR_EACH_RUN[name]}")


def check_data(runs: Sequence[Run], table: Table, *, data: str, options: Sequence[str]) -> None:
    """Check, before anything is trained, that the files that the unfinished runs read exist.

    Args:
        runs: The runs.
        table: Their table.
        data: The folder with the data sets.
        options: Additional options of `memformer train`; sections of the data that they move are not checked.

    Raises:
        InputError: Files are missing; the message says where to get them and where to put them.
    """
    sources = [
        source
        for run in runs
        if not run.is_finished
        for name, source in run.config.get("data", {}).items()
        if isinstance(source, dict) and not any(option.startswith(_places(name)) for option in options)
    ]
    if any(source.get("kind") == "huggingface" for source in sources) and find_spec("datasets") is None:
        raise InputError(f"{table.key} reads data sets of the Hugging Face hub: pip install 'memformer-lm[datasets]'")
    paths = dict.fromkeys(source["path"] for source in sources if source.get("path"))
    missing = [path for path in paths if not _exists(path)]
    if missing:
        folders = dict.fromkeys(Path(path).relative_to(data).parts[0] for path in missing if _is_below(path, data))
        origins = [f"{folder}: {table.data_sets[folder]}" for folder in folders if folder in table.data_sets]
        where = f" Where to get them: {'; '.join(origins)}." if origins else ""
        raise InputError(
            f"{table.key} needs {'files that do' if len(missing) > 1 else 'a file that does'} not exist: "
            f"{', '.join(missing)}.{where} Put the files there, or name the folder that holds "
            f"{' and '.join(f'{folder}/' for folder in folders) or 'them'} with --data FOLDER"
        )


def _places(section: str) -> tuple[str, ...]:
    """Return the options that make a section of the data read from another place."""
    return tuple(f"--data.{section}.{key}" for key in ("path", "kind", "name"))


def _exists(path: str) -> bool:
    try:
        return bool(locate_files(path))
    except InputError:
        return False


def _is_below(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def finish_runs(runs: Sequence[Run], *, jobs: int, options: Sequence[str]) -> None:
    """Train or resume all unfinished runs, and show the progress of all of them on stderr.

    Args:
        runs: The runs, in training order.
        jobs: Number of runs to train in parallel, each in its own process.
        options: Additional options of `memformer train`, for every run.

    Raises:
        InputError: Some runs failed; the others are finished.
        SaveError: A config cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; the runs in training were saved, and no other one began.
    """
    missing = [run for run in runs if not run.is_finished]
    total = sum(_total_updates(run, options) for run in missing)
    completed = sum(_num_updates(run) for run in missing)
    with (
        signals_noted() as signals,
        ProgressBar("training", total, unit="update", completed=completed) as progress,
        ThreadPoolExecutor(jobs) as pool,
        ChildProcesses(signals) as processes,
    ):
        progress.say(f"memformer: {len(runs) - len(missing)} of {len(runs)} runs are finished")
        endings = [pool.submit(_train, run, options, processes, progress.say) for run in missing]
        has_begun = False
        while wait(endings, timeout=SECONDS_BETWEEN_LOOKS).not_done:
            processes.pass_signal_on()
            for ending in endings:
                if ending.done():
                    ending.result()  # an error, not that of a run, ends all
            num_done = sum(run.is_finished for run in missing)
            num_updates = sum(map(_num_updates, missing))
            if num_updates > completed and not has_begun:
                has_begun = True
                progress.begin_at(num_updates)  # the data were tokenized before, once for all runs
            progress.advance_to(num_updates, f"{num_done} of {len(missing)} runs done")
    if signals.received and any(not run.is_finished for run in missing):
        raise Interrupted(signals.received[0], "the same command continues the runs")
    failed = [reason for ending in endings if (reason := ending.result())]
    if failed:
        raise InputError(f"{len(failed)} of {len(missing)} runs failed; {failed[0]}")


def _total_updates(run: Run, options: Sequence[str]) -> int:
    """Return the number of updates of a run, which an option may change."""
    total = run.config.get("training", {}).get("num_updates", TrainingConfig.num_updates)
    for option, following in zip_longest(options, options[1:], fillvalue=""):
        name, equals, value = option.partition("=")
        if name == "--training.num_updates":
            with contextlib.suppress(ValueError, OverflowError):  # the run itself refuses it
                total = int(float(value if equals else following))
    return total


def _num_updates(run: Run) -> int:
    """Return the number of updates in the log of a run, which may be in progress."""
    try:
        return max((int(line["update"]) for line in read_log(run.folder)), default=0)
    except CheckpointError:
        return 0


def _train(run: Run, options: Sequence[str], processes: ChildProcesses, say: Callable[[str], None]) -> str | None:
    """Train a run, unless the processes are stopped; return why it failed, or None."""
    if processes.are_stopped:
        return None
    command = [sys.executable, "-m", "memformer", *run.prepare_training(options)]
    name = f"memformer: {run.name}, seed {run.seed}"
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder / TRAIN_LOG
    started = time.monotonic()
    with file.open("a", encoding="utf-8") as log:
        num_bytes = file.stat().st_size
        say(f"{name}: started")
        status = processes.run(command, log)
    minutes = (time.monotonic() - started) / 60
    ending = "done" if status == 0 else "stopped" if processes.are_stopped else f"failed ({status})"
    say(f"{name}: {ending} after {minutes:.1f} min")
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        advice = "; the system does this when memory runs out: try fewer --jobs" if name == "SIGKILL" else ""
        return f"the process that trained {run.folder} was ended by {name}{advice}"
    return f"{file} says: {_last_error(file, num_bytes)}" if status else None


def _last_error(log: Path, num_bytes: int) -> str:
    """Return the last error in a log after so many bytes, or else its last line."""
    lines = log.read_bytes()[num_bytes:].decode("utf-8", errors="replace").splitlines() or ["nothing"]
    errors = [line for line in lines if line.startswith("memformer: error: ")]
    return (errors or lines)[-1]
