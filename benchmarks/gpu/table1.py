"""Table 1 (MNIST) at the paper's scale, slice by slice: each call trains on until no time is left.

Runs are those of `memformer reproduce table1 --scale paper`, one after the other; each is a folder with its checkpoint
in the output folder, from which the next call goes on. By the speeds in results/gpu-speed.json, the paper's Memformer
needs 50 minutes on an H100.
"""

import argparse
import importlib.util
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from memformer.errors import InputError
from memformer.reproduction.runs import TableRun, check_data, plan_runs
from memformer.reproduction.tables import Row as TableRow
from memformer.reproduction.tables import Table, read_table, tables_folder
from memformer.training.logs import read_log

Row = dict[str, Any]
# The paper's Memformer first, then its ablations, then the others; the LSTM has no memory to show.
_FIRST = "06-memformer"
_TYPES = ("memformer", "transformer_xl", "lstm", "compressive_transformer", "recurrent_memory_transformer")
# Shorter slices would mostly load the data.
_SHORTEST_SLICE_SECONDS = 30.0
_INTERRUPTED = 128 + signal.SIGINT
_OPTIONS = ("--training.keep_checkpoints=1", "--training.sample_tokens=0")
_TINY = (
    *(
        f"--data.{part}.{change}"
        for part in ("train", "validation", "test")
        for change in ("documents=:4", "downsample=4")
    ),
    "--training.num_updates=3",
    "--training.num_lanes=2",
    "--training.log_every=1",
    "--training.rollout_length=2",
    "--training.evaluation_tokens=98",
    "--model.d_model=16",
    "--model.num_heads=2",
    "--model.d_ff=32",
    "--model.num_encoder_layers=1",
    "--model.num_decoder_layers=1",
    "--model.num_slots=4",
)


def table1(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the look for the data, and then each run's name and next slice."""
    table = read_table(tables_folder() / "table1")
    metric = table.scale("paper").metric
    rows = sorted(table.rows_at("paper"), key=_order)
    folder, data = options.output / ("table1-smoke" if options.smoke else "table1"), str(options.data)
    runs = plan_runs(table, rows[:1] if options.smoke else rows, scale="paper", seeds=[0], folder=folder, data=data)
    train_options = (*_OPTIONS, *_TINY, f"--data.cache={folder / 'cache'}") if options.smoke else _OPTIONS
    found = look_for_parts(table, runs, data)
    yield "data", lambda: found
    if "missing" in found:
        return
    for run in runs:
        if not run.is_finished and options.deadline - time.monotonic() < _SHORTEST_SLICE_SECONDS:
            print(f"table1: no time is left for {run.row.key}", flush=True)
            return
        yield run.row.key, partial(train_on, run, train_options, options.deadline, metric=metric)


def _order(row: TableRow) -> tuple[bool, int, str]:
    return row.key != _FIRST, _TYPES.index(row.model_type), row.key


def look_for_parts(table: Table, runs: list[TableRun], data: str) -> Row:
    """Return where the data is, or what is missing."""
    if importlib.util.find_spec("jsonargparse") is None:
        return {"missing": "jsonargparse, with which the command reads its configs, is not installed"}
    try:
        check_data(runs, table, data=data, options=())
    except InputError as error:
        return {"missing": str(error)}
    return {"folder": data}


def train_on(run: TableRun, options: tuple[str, ...], deadline: float, *, metric: str) -> Row:
    """Train a run until it is finished or the time is up; return its result, or how far it is.

    Raises:
        InputError: Training failed.
    """
    command = run.prepare_training(options)
    from memformer.cli.main import main as memformer

    status = _stopped_after(deadline - time.monotonic(), lambda: memformer(command))
    if run.is_finished:
        return {"paper": run.row.paper, **run.result(metric)}
    if status != _INTERRUPTED:
        raise InputError(f"memformer {' '.join(command)} ended with status {status}")
    last = {line["kind"]: line for line in read_log(run.folder)}
    return {"unfinished": f"of {run.config['training']['num_updates']:,} updates", **last}


def _stopped_after(seconds: float, work: Callable[[], int]) -> int:
    """Return the exit status of some work, which is interrupted when the time is up.

    Raises:
        KeyboardInterrupt: The user interrupted it.
    """
    is_up = False

    def ring(number: int, frame: object) -> None:
        nonlocal is_up
        is_up = True
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        status = work()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if status == _INTERRUPTED and not is_up:
        raise KeyboardInterrupt
    return status
