"""The `memformer train` command."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memformer.cli.loading import prepare_torch
from memformer.cli.outside_values import warn_of_outside_values
from memformer.cli.parsing import parse
from memformer.cli.run_config import find_model_type, parse_run_config, read_config, train_parser
from memformer.data import (
    NUM_TASK_TOKENS,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from memformer.errors import CheckpointError, InputError
from memformer.models import build_model, load_model
from memformer.models.config import MemformerConfig
from memformer.training.checkpoint import checkpoints_newest_first, updates_of
from memformer.training.config import RunConfig
from memformer.training.processes import Processes, check_processes, processes_started, were_restarted
from memformer.training.run_data import (
    RunData,
    prepare_data,
)
from memformer.training.run_folder import (
    BEST,
    CHECKPOINTS,
    RESULT_FILE,
    newest_checkpoint,
    owned_run_folder,
    read_run_config,
    remove_partial,
    remove_remains,
    write_run_config,
)
from memformer.training.run_inputs import (
    LOCATION_KEYS,
    UnchangedInputs,
    check_apart,
    describe_inputs,
    find_changed_input,
    find_changed_key,
    find_shared_file,
    pin_revisions,
    read_inputs,
    write_inputs,
)
from memformer.training.trackers import check_trackers
from memformer.utils.files import user_path
from memformer.utils.progress import print_warning


def run_train(argv: list[str]) -> None:
    """Train or resume a run, and print the evaluation on held-out data.

    Raises:
        InputError: The config or the data is invalid, or the folder already contains a run.
    """
    helps = [option for option in argv if option in {"-h", "--help"} or re.fullmatch(r"--[\w.]+\.help", option)]
    if helps:
        # The help depends on the model type only, so the rest of the options and of the config is not checked.
        given = {} if argv[0].startswith("-") else read_config(user_path(argv[0]))
        parse(train_parser(find_model_type(given, argv, owner=argv[0])), helps)
    if not argv or argv[0].startswith("-"):
        raise InputError("memformer train needs a config first: memformer train CONFIG.yaml [--key value ...]")
    config, options = parse_run_config(argv)
    device = prepare_torch(config.device, config.threads)
    with processes_started(device.type) as processes:
        _train(config, options, device, processes)


def _train(config: RunConfig, options: Any, device: torch.device, processes: Processes) -> None:
    folder = user_path(config.folder)
    with owned_run_folder(folder, processes=processes):
        _train_in(folder, config, options, device, processes)


def _train_in(folder: Path, config: RunConfig, options: Any, device: torch.device, processes: Processes) -> None:
    from memformer.training.loop import train
    from memformer.training.report import write_report
    from memformer.training.run_memory import read_memory

    started_before = any(checkpoints_newest_first(folder / CHECKPOINTS))
    resume = options.resume or (started_before and were_restarted())

    def check() -> None:
        check_trackers(config.logging.trackers)
        check_processes(config, processes)
        if started_before and not resume:
            raise InputError(f"{folder} already contains a run; continue it with --resume, or choose another --folder")
        if (folder / RESULT_FILE).exists() and not started_before:
            raise InputError(
                f"{folder} contains a finished run without checkpoints, which cannot be continued; choose another "
                "--folder"
            )
        if not resume:
            check_apart(config.data, folder)

    processes.do_in_first(check)
    config.training.check_device(device)
    if processes.count > 1 and processes.is_first and config.writes_sparsely and config.data.recall is not None:
        print_warning(
            f"with {processes.count} processes, nothing helps a writer that stops writing (docs/distributed.md); if "
            "the loss stays at chance, train with one process"
        )
    saved = read_run_config(folder) if resume else None
    tokenizer = load_tokenizer(folder) if resume else None
    began_with = read_inputs(folder) if resume else None
    # One process asks the hub for the newest commit, which could be another one for the next.
    pinned = processes.from_first(processes.do_in_first(lambda: pin_revisions(config.data, saved)))
    config = dataclasses.replace(config, data=pinned)
    if saved is not None and tokenizer is not None:
        now = dataclasses.replace(config, model=_fit_vocabulary(config, tokenizer))
        # Files that were moved are found to be the same by their content, if the run has recorded it.
        changed = find_changed_key(saved, now, may_change=() if began_with is None else LOCATION_KEYS)
        processes.do_in_first(lambda: _refuse(changed))
        processes.do_in_first(lambda: _check_num_updates(folder, config.training.num_updates))
    if processes.is_first:
        print(f"preparing the data for {folder}", file=sys.stderr)

    def prepare() -> tuple[RunData, dict[str, Any]]:
        files = UnchangedInputs(config.data)
        if began_with is not None and tokenizer is not None:
            _refuse(find_changed_input(began_with, describe_inputs(config.data, tokenizer, known=began_with)))
        data = prepare_data(config.data, tokenizer=tokenizer, shows_progress=True)
        described = describe_inputs(config.data, data.tokenizer, known=began_with)
        files.check()
        return data, described

    prepared = processes.do_in_first(prepare)
    tokenizer = processes.from_first(None if prepared is None else prepared[0].tokenizer)
    # The other processes read the token ids that the first one has put into the cache.
    data, described = prepared or (prepare_data(config.data, tokenizer=tokenizer), {})
    config = dataclasses.replace(config, model=_fit_vocabulary(config, data.tokenizer))
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(device)
    data.make_stream(model, config)  # data that do not fit the model are refused before the run has a folder
    if processes.is_first:
        print(f"{model.num_parameters:,} parameters; {data.describe()}", file=sys.stderr)
        if (shared := find_shared_file(config.data, described)) is not None:
            print_warning(shared)
        if config.data.validation is not None:
            warn_of_outside_values(data.tokenizer, config.data.validation, name="data.validation")
        if resume:
            remove_partial(folder)
        else:
            remove_remains(folder)
        # The config first: it marks the folder as that of a run.
        write_run_config(folder, _config_to_write(folder, config, saved))
        save_tokenizer(data.tokenizer, folder)
        write_inputs(folder, described)
    result = train(config, data, model, resume=resume, processes=processes)
    if result is None:
        return
    summary = write_report(folder, memory=lambda: read_memory(load_model(folder / BEST, device=device), data))
    if options.json:
        print(json.dumps({"run": str(folder), **result.to_dict()}))
    else:
        print(result.to_table())
        print(f"run folder: {folder}; open {summary}")


def _refuse(change: str | None) -> None:
    if change is not None:
        raise CheckpointError(f"{change}; a run cannot be resumed with this change")


def _check_num_updates(folder: Path, num_updates: int) -> None:
    if _has_made(folder, num_updates + 1):
        done = updates_of(newest_checkpoint(folder))
        raise InputError(
            f"training.num_updates ({num_updates}) is below the {done} updates that {folder} has made; a run ends "
            f"at {done} or later"
        )


def _config_to_write(folder: Path, config: RunConfig, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the config to write into the run folder: training options that no update is made with do not count."""
    values = config.to_dict()
    num_updates = config.training.num_updates
    if saved is not None and _has_made(folder, num_updates):
        values["training"] = {**values["training"], **saved.get("training", {}), "num_updates": num_updates}
    return values


def _has_made(folder: Path, num_updates: int) -> bool:
    """Return whether a run has made this number of updates; checkpoints are only read if one is late enough."""
    late = [each for each in checkpoints_newest_first(folder / CHECKPOINTS) if updates_of(each) >= num_updates]
    return bool(late) and updates_of(newest_checkpoint(folder)) >= num_updates


def _fit_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> Any:
    default = type(config.model)().vocab_size
    if config.model.vocab_size not in {default, tokenizer.vocab_size}:
        raise InputError(
            f"model.vocab_size ({config.model.vocab_size}) contradicts the data's tokenizer of "
            f"{tokenizer.vocab_size} tokens; leave it out"
        )
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    if isinstance(model, MemformerConfig) and config.data.multitask is not None:
        num_special_tokens = max(model.num_special_tokens, NUM_TASK_TOKENS)
        model = dataclasses.replace(model, num_special_tokens=num_special_tokens)
    return model
