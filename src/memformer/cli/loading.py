"""Helpers shared by the commands that use a trained run: load its model, read its config, choose the device."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memformer.cli.outside_values import warn_of_outside_values
from memformer.cli.run_config import parse_run_config
from memformer.cli.unknown_words import UnknownWords
from memformer.cli.unread_keys import option_value
from memformer.data import Corpus, SourceConfig
from memformer.data.sources import keys_of_kind, locate_source_files
from memformer.errors import InputError
from memformer.training.config import DataConfig, RunConfig
from memformer.training.run_data import RunData, open_corpus, prepare_data
from memformer.training.run_folder import LoadedRun, load_run, use_float32_on_cpu
from memformer.training.run_inputs import describe_inputs, find_changed_input, read_inputs
from memformer.utils.checks import check_threads
from memformer.utils.machine import choose_device
from memformer.utils.progress import print_warning


def load_run_of(options: Any) -> LoadedRun:
    """Load the run in `options.run` onto `options.device`.

    Without --threads, the number of CPU threads of the training run is used. On a CPU, weights saved in half precision
    are used in float32.
    """
    device = prepare_torch(options.device, options.threads)
    run = load_run(
        options.run, which=options.checkpoint, device=device, num_slots=options.num_slots, warn=print_warning
    )
    use_float32_on_cpu(run.model)
    if options.threads is None and run.run_config is not None:
        _set_threads(run.run_config.get("threads"))
    return run


def run_config_of(run: LoadedRun) -> RunConfig:
    """Return the config a run was trained with.

    Raises:
        InputError: The folder was written by `save_pretrained`, which saves no run config.
    """
    if run.run_config is None:
        raise InputError(f"{run.folder} has no held-out documents of its own; give --data.kind and --data.path")
    return parse_run_config([str(run.folder)], warn=lambda _: None)[0]


def prepare_data_of(run: LoadedRun, data: DataConfig) -> RunData:
    """Return the data of a run, with a warning if its files are not those that the run was trained on.

    Raises:
        InputError: The data are missing or cannot be read; the message says where files were, if they still are there.
    """
    inputs = read_inputs(run.folder)
    if inputs is not None:
        try:
            now = describe_inputs(data, run.tokenizer, known=inputs)
        except InputError as error:
            # The message of a missing path begins with its option, that of a file that cannot be read with the file.
            found = [
                file["path"]
                for key, files in inputs["files"].items()
                for file in files
                if str(error).startswith((f"{key}.", f"{key} ")) and Path(file["path"]).exists()
            ]
            if not found:
                raise
            raise InputError(
                f"{error} in this folder; the run was trained on {found[0]}: give the command in the folder from "
                "which it was trained"
            ) from error
        change = find_changed_input(inputs, now)
        if change is not None:
            print_warning(f"{change}; the result is about other documents, some of which may have been trained on")
    return prepare_data(data, tokenizer=run.tokenizer, shows_progress=True)


def source_of(run: LoadedRun, options: Any, argv: Sequence[str]) -> SourceConfig | None:
    """Return the documents of the option --data; without --data.kind, they are of the kind that the run was trained on.

    Args:
        run: The run.
        options: The options.
        argv: The options as they were given.

    Raises:
        InputError: --data itself has a value, which the kind could not be looked for in.
    """
    if option_value(argv, "--data") is not None:
        raise InputError("--data is no option: --data.path names the documents, and --data.KEY sets another key")
    source: SourceConfig | None = options.data
    if source is None or source.path is None or run.run_config is None:
        return source
    if option_value(argv, "--data.kind") is not None:
        return source
    kind = run_config_of(run).data.train.kind
    return dataclasses.replace(source, kind=kind) if "path" in keys_of_kind(kind) else source


def open_given(run: LoadedRun, source: SourceConfig) -> Corpus:
    """Return whole documents that are given with --data as token ids of the run's tokenizer.

    Raises:
        InputError: They cannot be read, or do not fit the run.
    """
    locate_source_files(source, section="data")  # here, so that a message about the path names the option
    config = DataConfig() if run.run_config is None else run_config_of(run).data
    config = dataclasses.replace(config, max_document_tokens=None)
    corpus = open_corpus(config, source, tokenizer=run.tokenizer, shows_progress=True)
    warn_of_outside_values(run.tokenizer, source, name="data")
    unknown = UnknownWords(run.tokenizer)
    for index in range(corpus.num_documents if unknown.can_occur else 0):
        unknown.add(corpus.document(index))
    unknown.warn_if_most("the documents")
    return corpus


def prepare_torch(device: str, threads: int | None) -> torch.device:
    """Set the number of CPU threads, if given, and return the device.

    Raises:
        InputError: The number of threads is out of range, or the device does not exist.
    """
    _set_threads(threads)
    return choose_device(device)


def _set_threads(threads: object) -> None:
    number = check_threads(threads)
    if number is not None:
        torch.set_num_threads(number)
