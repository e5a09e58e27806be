"""Reuse of runs: only if they were trained as the table, the options and the data now say."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from memformer.data import load_tokenizer
from memformer.errors import InputError
from memformer.reproduction.runs import Run
from memformer.training.checkpoint import checkpoints_newest_first
from memformer.training.config import RunConfig, TrainingConfig
from memformer.training.run_folder import CHECKPOINTS, RESULT_FILE, read_run_config
from memformer.training.run_inputs import (
    LOCATION_KEYS,
    describe_inputs,
    find_changed_input,
    find_changed_key,
    pin_revisions,
    read_inputs,
)
from memformer.utils.files import write_text
from memformer.utils.yaml_files import to_yaml

ParseConfig = Callable[[Sequence[str]], RunConfig]

# Settings that change the speed or the output of training, not its results.
_SAME_RESULTS = frozenset(
    {
        "method",
        "engine",
        "readout_timesteps",
        "sharding",
        "compiled",
        "log_every",
        "sample_tokens",
        "save_every",
        "keep_checkpoints",
    }
)
_COMPARED = {field.name for field in dataclasses.fields(TrainingConfig)} - _SAME_RESULTS
_ADVICE = "train it again in another --folder, or delete it"


def check_runs(runs: Sequence[Run], *, options: Sequence[str], parse: ParseConfig) -> None:
    """Check the options with the config of every run, and that all runs that were begun can be reused or continued.

    The data is compared by content. If its files are not there, it is not compared: finished runs do not need them.

    Args:
        runs: The runs.
        options: Additional options of `memformer train`, for every run.
        parse: Returns the config of `memformer train` for its arguments.

    Raises:
        InputError: A run was trained with another config or on other data; or an option is invalid.
        CheckpointError: A file of a run is damaged.
    """
    # Many runs differ in the seed alone, and parsing takes long.
    planned: dict[str, RunConfig] = {}
    for run in runs:
        if (config := to_yaml(run.config)) not in planned:
            planned[config] = parse_run(run, options, parse)
        check_run(run.folder, dataclasses.replace(planned[config], seed=run.seed))


def parse_run(run: Run, options: Sequence[str], parse: ParseConfig) -> RunConfig:
    """Return the config of a run with additional options of `memformer train`.

    Raises:
        InputError: An option is invalid.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{run.folder.name}.yaml"
        write_text(file, to_yaml(run.config))
        return parse([str(file), *options])


def check_run(folder: Path, planned: RunConfig) -> None:
    """Check that the run in a folder, if one was begun, has a config, up to settings that do not change its results.

    Raises:
        InputError: It was trained with another config or on other data.
        CheckpointError: A file of the run is damaged.
    """
    if not (folder / RESULT_FILE).is_file() and not any(checkpoints_newest_first(folder / CHECKPOINTS)):
        return
    saved, began_with = read_run_config(folder), read_inputs(folder)
    tokenizer = load_tokenizer(folder)
    # `memformer train` derives these from the tokenizer and the tasks.
    began_model = saved.get("model") or {}
    derived = {name: began_model[name] for name in ("vocab_size", "num_special_tokens") if name in began_model}
    now = dataclasses.replace(
        planned,
        model=dataclasses.replace(planned.model, **derived),
        data=pin_revisions(planned.data, saved),
    )
    may_change = () if began_with is None else LOCATION_KEYS
    change = find_changed_key(saved, now, may_change=may_change, training=_COMPARED)
    if change is None and began_with is not None:
        # The files may be gone: finished runs do not need them.
        with contextlib.suppress(InputError):
            change = find_changed_input(began_with, describe_inputs(now.data, tokenizer, known=began_with))
    if change is not None:
        raise InputError(f"{folder} cannot be reused: {change}; {_ADVICE}")
