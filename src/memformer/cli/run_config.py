"""Builds the config of a run from a YAML file and the options of `memformer train`."""

import dataclasses
import functools
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace

from memformer.cli.parsing import new_parser, parse
from memformer.cli.unread_keys import drop_unread_keys, option_value
from memformer.data import SourceConfig
from memformer.data.tokenizer_training import TokenizerConfig
from memformer.errors import InputError
from memformer.models.config import MemformerConfig
from memformer.models.loading import MODELS
from memformer.models.presets import Preset, preset_fields
from memformer.training.config import SOURCES, RunConfig
from memformer.training.run_folder import read_run_config, with_current_names
from memformer.utils.checks import refuse_unknown_keys, shown
from memformer.utils.fields import convert_text
from memformer.utils.files import user_path
from memformer.utils.progress import print_warning
from memformer.utils.renames import old_names_sentence, update_options
from memformer.utils.yaml_files import read_yaml, to_yaml

PRESET_HELP = (
    "A named set of model options, each of which can still be overridden. paper: the paper's memory, with one "
    "forgetting speed for all slots (forgetting_speeds [0.1, 0.1], log_forgetting_speeds false), and the paper's "
    "decoder (decoder_attention separate, decoder_start_tokens 0). recall: the same decoder, and a "
    "memory that keeps single facts over long distances (write_normalizer entmax15, write_competition, "
    "num_writer_heads 1, forgetting_when_written, exchangeable_slots, forgetting_speeds [0.05, 0.05], "
    "log_forgetting_speeds false, free_slot_bias 8). default: the defaults below."
)
TRAIN_HELP = """Train a Memformer, or one of the baselines that the paper compares it with (--model_type).

The model reads a document in segments of a fixed number of tokens (model.segment_length). One segment is read per
timestep, and a memory of a fixed number of vectors (slots) carries information from one timestep to the next. A rollout
is a number of consecutive timesteps; gradients flow through all timesteps of a rollout and stop at its edges.

CONFIG is a YAML file; or a run folder, which --resume continues and whose config another --folder reuses. Options
override its keys:

  memformer train experiments/text.yaml --data.train.path my_book.txt
  memformer train experiments/text.yaml --data.train.path my_book.txt --model.num_slots 64 --folder runs/more-slots
  memformer train runs/more-slots --resume
  memformer train experiments/text.yaml --model_type transformer_xl --help

The run folder contains config.yaml (all keys, with their values), versions.json, log.jsonl, tensorboard/, samples/,
checkpoints/, best/ (the weights with the best score on held-out data), evaluation.json and summary.html. Weights &
Biases and trackio get the numbers of log.jsonl with --logging.trackers tensorboard,wandb,trackio.
"""


# Derived from the tokenizer and the tasks of the data, so they are not options; a saved config contains them.
_DERIVED = ("vocab_size", "num_special_tokens")
# Options of jsonargparse for a whole section, or another config: presets and names of version 0.1 are not read there.
_REFUSED = ("config", "data", "data.train", "data.tokenizer", "training", "model", "logging")
# Options of jsonargparse that duplicate a key or help shown elsewhere are not listed in the help.
_UNLISTED = (*_REFUSED, "print_config")
_UNLISTED_HELP = ("data.validation.help", "data.test.help", "data.recall.help", "data.multitask.help")


@functools.cache
def train_parser(model_type: str = MemformerConfig.model_type) -> ArgumentParser:
    """Return the parser of `memformer train` for a model type; the config file is passed as `--config`."""
    parser = new_parser("train", TRAIN_HELP, "CONFIG [--key value ...] [--resume] [--json]")
    parser.add_argument("--config", action="config", help=SUPPRESS)
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in --folder from its newest undamaged checkpoint."
    )
    parser.add_argument("--json", action="store_true", help="Print the final evaluation to stdout as one JSON object.")
    parser.add_class_arguments(RunConfig, skip={"model"})
    config_class = MODELS[model_type].config_class
    derived = {field.name for field in dataclasses.fields(config_class)} & {*_DERIVED}
    parser.add_class_arguments(config_class, "model", skip={*derived})
    if config_class is MemformerConfig:
        # `_apply_presets` reads it before the options are parsed, because it sets other keys.
        parser.add_argument("--model.preset", choices=get_args(Preset), default=SUPPRESS, help=PRESET_HELP)
    for action in parser._actions:
        if action.dest in _UNLISTED or action.dest in _UNLISTED_HELP:
            action.help = SUPPRESS
    return parser


def parse_run_config(
    argv: Sequence[str], *, warn: Callable[[str], None] = print_warning
) -> tuple[RunConfig, Namespace]:
    """Return the config of `memformer train`, merged from file and options, and the other options.

    If a run folder is given, its config is used, and it is the run's folder even if that config has another `folder`.

    Args:
        argv: The YAML file or run folder, followed by options.
        warn: Called with a message if names from version 0.1 are used, or if the options choose another model or kind
            of data, which does not read some keys of the file.

    Raises:
        InputError: The file is missing or malformed, or a key or value is invalid.
        CheckpointError: The config of a run folder is missing or damaged.
    """
    path, (rest, option_notes) = user_path(argv[0]), update_options(argv[1:])
    if option_notes:
        warn(old_names_sentence("the command", option_notes))
    given = read_config(path, warn=warn)
    for name in _REFUSED:
        if option_value(rest, f"--{name}") is not None:
            raise InputError(f"--{name} is no option: the config comes first, and --KEY.KEY sets one of its keys")
    rest = _with_kinds(given, rest)
    if unread := drop_unread_keys(given, rest, owner=str(path)):
        warn(unread)
    folder_option = ["--folder", str(path)] if path.is_dir() else []
    model_type = find_model_type(given, rest, owner=str(path))
    rest = _apply_presets(given, rest, model_type, owner=str(path))
    _check_keys(given, RunConfig, owner=str(path), kinds={"model": MODELS[model_type].config_class})
    model = given.get("model", {})
    derived = {name: model.pop(name) for name in _DERIVED if name in model}
    if path.is_dir():
        # Derived again, because a new run with this config may have another tokenizer.
        derived.pop("vocab_size", None)
    parser = train_parser(model_type)
    sections = {"model": MODELS[model_type].config_class, "data.tokenizer": TokenizerConfig}
    sections |= {f"data.{name}": SourceConfig for name in SOURCES}
    options = parse(parser, ["--config", to_yaml(given), *folder_option, *rest], sections=sections)
    fields = {field.name: options[field.name] for field in dataclasses.fields(RunConfig)}
    fields["model"] = dataclasses.replace(fields["model"], **derived)
    return RunConfig(**fields), options


def _with_kinds(given: dict[str, Any], options: Sequence[str]) -> list[str]:
    """Return the options with the kinds of the sources that neither they nor the config `given` name.

    Training documents with a path are texts, and those with a name a data set of the hub. Validation and test documents
    are of the same kind as the training documents.
    """
    data = given.get("data", {})

    def value(section: str, key: str) -> Any:
        option = option_value(options, f"--data.{section}.{key}")
        in_file = data.get(section) if isinstance(data, dict) else None
        return option if option is not None or not isinstance(in_file, dict) else in_file.get(key)

    kinds: list[str] = []
    kind = value("train", "kind")
    for section in SOURCES:
        is_located = value(section, "path") is not None or value(section, "name") is not None
        if section == "train" and kind is None and is_located:
            kind = "huggingface" if value("train", "path") is None else "text"
        if value(section, "kind") is None and is_located and isinstance(kind, str):
            kinds += [f"--data.{section}.kind", kind]
    return [*kinds, *options]


def read_config(path: Path, *, warn: Callable[[str], None] = print_warning) -> dict[str, Any]:
    """Return the config in a YAML file or run folder as plain values, under the current names.

    Args:
        path: The file or folder.
        warn: Called with a message if the config uses names from version 0.1 and was not written by a run.

    Raises:
        InputError: The file is missing or malformed.
        CheckpointError: The config of a run folder is missing or damaged.
    """
    if path.is_dir():
        return read_run_config(path, warn=warn)
    return with_current_names(read_yaml(path), path, warn=warn)


def _preset_fields(name: object, *, owner: str) -> dict[str, Any]:
    try:
        return preset_fields(name)
    except InputError as error:
        raise InputError(f"model.{error} in {owner}") from error


def _apply_presets(given: dict[str, Any], options: Sequence[str], model_type: str, *, owner: str) -> list[str]:
    """Merge the fields of `model.preset` into the config `given`; return the options without `--model.preset`.

    In the file, other keys take precedence over the preset's fields. On the command line, the preset's fields take
    precedence over the keys in the file, and other options over the preset.

    Raises:
        InputError: The preset is unknown, or the model type has no presets.
    """
    rest: list[str] = []
    from_options: str | None = None
    values = iter(options)
    for option in values:
        name, equals, value = option.partition("=")
        if name == "--model.preset":
            from_options = value if equals else next(values, "")
        else:
            rest.append(option)
    model = given.get("model", {})
    if not isinstance(model, dict):
        return rest  # `_check_keys` refuses it
    in_file = model.pop("preset", None)
    if (from_options is not None or in_file is not None) and model_type != MemformerConfig.model_type:
        raise InputError(f"model.preset needs model_type 'memformer', not {model_type!r}")
    if in_file is not None:
        given["model"] = model = {**_preset_fields(in_file, owner=owner), **model}
    if from_options is not None:
        given["model"] = {**model, **_preset_fields(from_options, owner="--model.preset")}
    return rest


def find_model_type(given: Mapping[str, Any], options: Sequence[str], *, owner: str) -> str:
    """Return the model type, which determines the available options.

    Raises:
        InputError: The model type is unknown.
    """
    model_type = given.get("model_type", MemformerConfig.model_type)
    if (chosen := option_value(options, "--model_type")) is not None:
        model_type, owner = chosen, "--model_type"
    if model_type not in list(MODELS):  # a list, because a value from a file may be unhashable
        raise InputError(f"model_type ({model_type!r}) in {owner} must be one of {', '.join(MODELS)}")
    return str(model_type)


def _check_keys(
    given: dict[str, Any], kind: type, *, owner: str, kinds: Mapping[str, type] | None = None, prefix: str = ""
) -> None:
    """Check the keys and types of a section of a config, and convert its values in place ("1e-3" becomes 0.001).

    Args:
        given: The section as plain values.
        kind: The dataclass of the section.
        owner: Name of the section in messages.
        kinds: Dataclasses of subsections, if the annotations name only their base class.
        prefix: Prefix of the keys' full names, for example "training.".

    Raises:
        InputError: A key is unknown, or a value has the wrong type or is not valid.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown_keys(given, valid=fields, owner=owner)
    for name, value in given.items():
        possible = get_args(fields[name].type) or ((kinds or {}).get(name, fields[name].type),)
        nested = [kind for kind in possible if dataclasses.is_dataclass(kind)]
        if value is None and type(None) in possible:
            continue
        if nested:
            if not isinstance(value, dict):
                raise InputError(f"{name} ({shown(value)}) in {owner} must be a mapping of keys to values")
            assert isinstance(nested[0], type)
            _check_keys(value, nested[0], owner=f"{owner}, {name}", prefix=f"{prefix}{name}.")
        elif value is None:  # the parser accepts null for any type
            raise InputError(f"{name} (null) in {owner} must have a value; leave it out for the default")
        else:
            given[name] = convert_text(f"{prefix}{name}", value, fields[name].type)
