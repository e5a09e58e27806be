"""What each subcommand takes: parsers whose help comes from the dataclasses' own documentation."""

import dataclasses
import difflib
import importlib.metadata
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from memformer.config import MemformerConfig, refuse_unknown_keys
from memformer.data import SourceConfig
from memformer.errors import InputError
from memformer.models.loading import MODELS
from memformer.training.config import RunConfig
from memformer.training.run import RUN_CONFIG_FILE, read_run_config
from memformer.training.samples import NUM_IMAGES
from memformer.yaml_files import read_yaml

NEW_TOKENS = 500

TRAIN_HELP = """Train a Memformer, or one of the models that the paper compares it with (--model_type).

CONFIG is a YAML file (or the folder of a run, to use its config again). Every key of it can be overridden:

  memformer train experiments/text.yaml --data.train.path my_book.txt
  memformer train experiments/text.yaml --model.num_slots 64 --folder runs/more-slots
  memformer train runs/more-slots --resume
  memformer train experiments/text.yaml --model_type transformer_xl --help

The run folder gets: config.yaml (resolved), versions.json, log.jsonl, tensorboard/, samples/, checkpoints/,
best/ (the best weights on held-out documents), evaluation.json and summary.html.
"""
EVALUATE_HELP = """Report how well a model predicts documents, and what its memory is worth.

RUN is a run folder, or a folder from save_pretrained with a tokenizer. Every token of every document counts once.
Beside each figure stands the same with the memory erased before every segment.

  memformer evaluate runs/demo
  memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json
"""
RETENTION_HELP = """Report how long the memory of a run holds, into retention.json and retention.png.

Of a run on a recall task: how many answers are right by the distance between the last fact and the question, far
beyond the distances trained on. Of a run on documents: bits per token by the position in the document, with the memory
and with it erased; and bits per byte with the memory of d segments earlier in place of the present one, which tells
what the memory of the last d segments is worth, and what that of all before. Those figures are over the same tokens for
all d: the ones with at least as many segments of their document before them as the largest d. Bytes of them are
counted as the mean over all tokens.

  memformer retention runs/recall
  memformer retention runs/recall --distances 1 100 10000 60000 --num_facts 8 --num_episodes 16
  memformer retention runs/demo --delays 1 4 16 64 --max_tokens 1000000 --output notes/demo --json
"""
GENERATE_HELP = """Continue a text, or draw images.

RUN is a run folder, or a folder from save_pretrained with a tokenizer. A prompt of any length is read into the
memory; the new text is written to stdout as it appears. Runs on images write a grid as PNG instead.

  memformer generate runs/demo --prompt "import os"
  cat chapters/*.txt | memformer generate runs/demo --prompt_file - --temperature 0.8
  memformer generate runs/demo --prompt_file diary.txt --save_session diary.session
  memformer generate runs/demo --load_session diary.session --prompt " And then"
  memformer generate runs/digits --output digits.png --num_images 36
"""
REPORT_HELP = """Write summary.html into a run folder: loss curve, figures, samples, config.

  memformer report runs/demo
"""
REPRODUCE_HELP = """Train the rows of one of the paper's tables, and write the table beside the paper's figures.

Tables: table1 (MNIST), table2 (text; also --scale books and paper_bpe), v1 (the paper's first version: tasks,
positions, slots, horizons). Measured in a minute or two without training: table3 (methods), figure5 (costs).

Runs that are finished are taken as they are, those that were stopped go on, so the command can be given again until all
are done. Into the folder go a run folder for every row and seed, table.md, table.json and table.png. What follows --
goes to every `memformer train`.

  memformer reproduce table1 --scale small --seeds 3 --jobs 2
  memformer reproduce table1 --scale paper --rows 06-memformer -- --device cuda
  memformer reproduce table1 --only_write
"""


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Options from dataclasses, description as it was written."""


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Return the parsed arguments, objects built.

    Raises:
        InputError: An argument is unknown (the nearest valid one is named) or has the wrong type.
    """
    try:
        return parser.instantiate(parser.parse_args(list(argv)))
    except (ArgumentError, ValueError) as error:
        raise InputError(_explain(error, parser, argv)) from error


def _explain(error: Exception, parser: ArgumentParser, argv: Sequence[str]) -> str:
    known = [option for action in parser._actions for option in _options(action)]
    for argument in argv:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
            return f"unknown option {option}; {hint}"
    # Where a dataclass refused its fields, what it said is clearer than what the parser makes of it.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(cause or error).split())


def _options(action: Action) -> list[str]:
    # The fields of an optional nested dataclass are not in the parser's list: their parent takes them.
    kinds = get_args(getattr(action, "_typehint", None))
    fields = [field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    return [*action.option_strings, *(f"{option}.{name}" for option in action.option_strings for name in fields)]


def _parser(command: str, description: str, usage: str) -> ArgumentParser:
    # exit_on_error is off so that every mistake becomes one line; abbreviations are mistakes too.
    return ArgumentParser(
        prog=f"memformer {command}",
        usage=f"memformer {command} {usage}",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def version() -> str:
    """Return the installed version of the package."""
    return importlib.metadata.version("memformer-lm")


def train_parser(model_type: str = MemformerConfig.model_type) -> ArgumentParser:
    """Return the parser of `memformer train` for a type of model; the first argument has become `--config`."""
    parser = _parser("train", TRAIN_HELP, "CONFIG [--key value ...] [--resume] [--json]")
    parser.add_argument("--config", action="config", help="The YAML file; the first argument stands for it.")
    parser.add_argument("--resume", action="store_true", help="Go on from the newest whole checkpoint of the run.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    parser.add_class_arguments(RunConfig, skip={"model"})
    parser.add_class_arguments(MODELS[model_type].config_class, "model")
    return parser


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `memformer evaluate`."""
    parser = _parser("evaluate", EVALUATE_HELP, "RUN [--data.kind KIND --data.path PATH] [--json]")
    _add_run_arguments(parser)
    parser.add_argument(
        "--data", type=SourceConfig | None, default=None, help="Documents; the run's held-out ones if not given."
    )
    parser.add_argument(
        "--num_lanes", type=int | None, default=None, help="Documents read side by side; 8 if not given."
    )
    return parser


def retention_parser() -> ArgumentParser:
    """Return the parser of `memformer retention`; None means that an option was not given."""
    parser = _parser("retention", RETENTION_HELP, "RUN [options of its kind] [--output FOLDER] [--json]")
    _add_run_arguments(parser)
    parser.add_argument("--output", type=str, default=None, help="Folder for the files; the run folder if not given.")
    recall, documents = "Recall run: ", "Run on documents: "
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=None,
        help=recall + "segments from the last fact to the question; 1, 2, 4, ... 32 times the longest of training.",
    )
    numbers = (
        ("num_facts", recall + "facts of an episode; the most trained on if not given."),
        ("facts_per_segment", recall + "facts told in one segment; the most trained on if not given."),
        ("max_fact_gap", recall + "segments of filler between two that tell facts, at most; as trained if not given."),
        ("num_episodes", recall + "episodes, read side by side; 64 if not given."),
        ("questions", recall + "different questions asked of each episode at each distance, at most; 4 if not given."),
        ("seed", recall + "decides the episodes; 0 if not given."),
        ("max_tokens", documents + "held-out tokens, whole documents, the first that reach this; 200000 if not given."),
        ("num_lanes", documents + "documents read side by side; 8 if not given."),
    )
    for name, text in numbers:
        parser.add_argument(f"--{name}", type=int | None, default=None, help=text)
    parser.add_argument(
        "--delays",
        type=int,
        nargs="+",
        default=None,
        help=documents + "how many segments old a memory is read; 0, 1, 2, 4, ... 32, as far as documents reach.",
    )
    return parser


def generate_parser() -> ArgumentParser:
    """Return the parser of `memformer generate`."""
    parser = _parser("generate", GENERATE_HELP, "RUN [--prompt TEXT | --prompt_file FILE] [options]")
    _add_run_arguments(parser)
    parser.add_argument("--prompt", type=str, default=None, help="Text to read first.")
    parser.add_argument("--prompt_file", type=str, default=None, help="File to read first; - for stdin.")
    parser.add_argument(
        "--max_new_tokens", type=int | None, default=None, help=f"Tokens to generate; {NEW_TOKENS} if not given."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Below 1 sharpens, 0 is greedy.")
    parser.add_argument("--top_k", type=int | None, default=None, help="Sample among the k likeliest tokens.")
    parser.add_argument(
        "--top_p", type=float | None, default=None, help="Sample among the likeliest tokens of this probability."
    )
    parser.add_argument("--seed", type=int | None, default=None, help="Makes the result repeatable.")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="Compile the decoding step: some seconds at the second segment, then up to three times the speed.",
    )
    parser.add_argument("--load_session", type=str, default=None, help="State to go on from.")
    parser.add_argument("--save_session", type=str, default=None, help="Where to save the state at the end.")
    parser.add_argument(
        "--num_images", type=int | None, default=None, help=f"For images: how many; {NUM_IMAGES} if not given."
    )
    parser.add_argument("--output", type=str, default=None, help="For images: the PNG file.")
    return parser


def report_parser() -> ArgumentParser:
    """Return the parser of `memformer report`."""
    parser = _parser("report", REPORT_HELP, "RUN [--json]")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    return parser


def reproduce_parser() -> ArgumentParser:
    """Return the parser of `memformer reproduce`."""
    parser = _parser("reproduce", REPRODUCE_HELP, "TABLE [--scale SCALE] [options] [-- options of train]")
    parser.add_argument("table", type=str, help="The table.")
    parser.add_argument("--scale", default="small", help="small, for a CPU; paper; or another that the table has.")
    parser.add_argument("--seeds", type=int, default=1, help="Seeds of every row: 0, 1, ...")
    parser.add_argument("--rows", type=str, nargs="+", default=None, help="Rows by their keys; all if not given.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs trained at a time.")
    parser.add_argument("--data", type=str, default="../shared/data", help="Folder of the data sets.")
    parser.add_argument("--folder", type=str, default=None, help="Where it lands; runs/TABLE-SCALE if not given.")
    parser.add_argument("--only_write", action="store_true", help="Train nothing; write what is finished.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    return parser


def _add_run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Run folder, or folder from save_pretrained.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="Which weights of a run.")
    parser.add_argument(
        "--num_slots",
        type=int | None,
        default=None,
        help="Memory slots to run with, for a model of exchangeable_slots; as trained if not given.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads of torch; those of the run if not given."
    )


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
