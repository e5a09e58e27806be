"""Argument parsers: the help comes from the dataclass docstrings, and every invalid input gives one error line."""

import dataclasses
import difflib
import importlib.metadata
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from memformer.errors import InputError
from memformer.utils.checks import check_integer

_DERIVED_OPTIONS = ("--model.vocab_size", "--model.num_special_tokens")


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Formats dataclass options and leaves the line breaks of the description unchanged."""


def new_parser(command: str, description: str, usage: str) -> ArgumentParser:
    """Return the parser of a subcommand, without arguments."""
    # With exit_on_error off, `parse` can turn every error into one line. Abbreviated options are errors too.
    return ArgumentParser(
        prog=f"memformer {command}",
        usage=f"memformer {command} {usage}",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Return the parsed arguments, with the dataclasses instantiated.

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
        if option in _DERIVED_OPTIONS:
            return f"{option} cannot be set: it is derived from the tokenizer and the tasks of the data"
        if option.startswith("--") and option not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
            return f"unknown option {option}; {hint}"
    # Where a dataclass rejected its fields, its own message is clearer than the parser's.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(cause or error).split())


def _options(action: Action) -> list[str]:
    # The parser does not list the fields of an optional nested dataclass; their parent option accepts them.
    kinds = get_args(getattr(action, "_typehint", None))
    fields = [field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    return [*action.option_strings, *(f"{option}.{name}" for option in action.option_strings for name in fields)]


def version() -> str:
    """Return the installed version of the package."""
    return importlib.metadata.version("memformer-lm")


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the arguments shared by all commands that use a trained model."""
    parser.add_argument("run", type=str, help="Run folder, or a folder from save_pretrained.")
    parser.add_argument("--json", action="store_true", help="Print the result to stdout as one JSON object.")
    parser.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="best",
        help="Weights of the run to load: best (best score on held-out data) or last (newest checkpoint).",
    )
    parser.add_argument(
        "--num_slots",
        type=int | None,
        default=None,
        help="Number of memory slots to use (a slot is one vector of the memory); for models with "
        "exchangeable_slots only. Default: as trained.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if available), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads of torch. Default: as in training."
    )


def positive(options: Any, name: str, *, default: int) -> int:
    """Return an option, or its default if it was not given.

    Raises:
        InputError: The option is below 1.
    """
    value: int = default if options[name] is None else options[name]
    check_integer(name, value, 1)
    return value


def refuse_options(options: Any, names: Sequence[str], *, kind: str) -> None:
    """Check that none of these options was given, because they do not apply to this kind of run.

    Raises:
        InputError: One of them was given.
    """
    for name in names:
        if options[name] is not None:
            raise InputError(f"--{name} does not apply to a run {kind}")
