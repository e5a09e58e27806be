"""The config of a run, from a YAML file and the options of `memformer train`."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace

from memformer.cli.parsing import new_parser, parse
from memformer.errors import InputError
from memformer.models.config import MemformerConfig
from memformer.models.loading import MODELS
from memformer.training.config import RunConfig
from memformer.training.run_folder import (
    RUN_CONFIG_FILE,
    read_run_config,
)
from memformer.utils.checks import refuse_unknown_keys
from memformer.utils.yaml_files import read_yaml

TRAIN_HELP = """Train a Memformer, or one of the models that the paper compares it with (--model_type).

CONFIG is a YAML file (or the folder of a run, to use its config again). Every key of it can be overridden:

  memformer train experiments/text.yaml --data.train.path my_book.txt
  memformer train experiments/text.yaml --model.num_slots 64 --folder runs/more-slots
  memformer train runs/more-slots --resume
  memformer train experiments/text.yaml --model_type transformer_xl --help

The run folder gets: config.yaml (resolved), versions.json, log.jsonl, tensorboard/, samples/, checkpoints/,
best/ (the best weights on held-out documents), evaluation.json and summary.html.
"""


def train_parser(model_type: str = MemformerConfig.model_type) -> ArgumentParser:
    """Return the parser of `memformer train` for a type of model; the first argument has become `--config`."""
    parser = new_parser("train", TRAIN_HELP, "CONFIG [--key value ...] [--resume] [--json]")
    parser.add_argument("--config", action="config", help="The YAML file; the first argument stands for it.")
    parser.add_argument("--resume", action="store_true", help="Go on from the newest whole checkpoint of the run.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    parser.add_class_arguments(RunConfig, skip={"model"})
    parser.add_class_arguments(MODELS[model_type].config_class, "model")
    return parser


def parse_run_config(argv: Sequence[str]) -> tuple[RunConfig, Namespace]:
    """Return the config of `memformer train`, file and options together, and the other options.

    Of a run folder: the run is there, whatever its config calls it, wherever it was begun.

    Raises:
        InputError: The file is missing or malformed, or a key or value is wrong.
        CheckpointError: The config of a run folder is missing or damaged.
    """
    path, rest = Path(argv[0]), list(argv[1:])
    where: list[str] = []
    if path.is_dir():
        given = read_run_config(path)
        path, where = path / RUN_CONFIG_FILE, ["--folder", str(path)]
    else:
        given = read_yaml(path)
    model_type = find_model_type(given, rest, owner=str(path))
    _check_keys(given, RunConfig, owner=str(path), kinds={"model": MODELS[model_type].config_class})
    options = parse(train_parser(model_type), ["--config", str(path), *where, *rest])
    fields = {field.name: options[field.name] for field in dataclasses.fields(RunConfig)}
    return RunConfig(**fields), options


def find_model_type(given: Mapping[str, Any], options: Sequence[str], *, owner: str) -> str:
    """Return the type of model: it decides which options there are.

    Raises:
        InputError: There is no such type.
    """
    model_type = given.get("model_type", MemformerConfig.model_type)
    for option, following in zip_longest(options, options[1:]):
        name, _, value = option.partition("=")
        if name == "--model_type":
            model_type, owner = value or following, "--model_type"
    if model_type not in list(MODELS):  # a list, for a file may hold what cannot be hashed
        raise InputError(f"model_type ({model_type!r}) in {owner} must be one of {', '.join(MODELS)}")
    return str(model_type)


def _check_keys(given: Mapping[str, Any], kind: type, *, owner: str, kinds: Mapping[str, type] | None = None) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown_keys(given, valid=fields, owner=owner)
    for name, value in given.items():
        possible = get_args(fields[name].type) or ((kinds or {}).get(name, fields[name].type),)
        nested = [kind for kind in possible if dataclasses.is_dataclass(kind)]
        if value is None and type(None) in possible:
            continue
        if nested:
            if not isinstance(value, dict):
                raise InputError(f"{name} ({value!r}) in {owner} must be a mapping of keys to values")
            assert isinstance(nested[0], type)
            _check_keys(value, nested[0], owner=f"{owner}, {name}")
        elif value is None:  # the parser takes it for any type
            raise InputError(f"{name} (null) in {owner} must have a value; leave it out for the default")
