"""Parsers of the command: help comes from the dataclasses' own documentation, every mistake is one line."""

import dataclasses
import difflib
import importlib.metadata
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from memformer.errors import InputError


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Options from dataclasses, description as it was written."""


def new_parser(command: str, description: str, usage: str) -> ArgumentParser:
    """Return a parser without arguments for a subcommand."""
    # exit_on_error is off so that every mistake becomes one line; abbreviations are mistakes too.
    return ArgumentParser(
        prog=f"memformer {command}",
        usage=f"memformer {command} {usage}",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


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


def version() -> str:
    """Return the installed version of the package."""
    return importlib.metadata.version("memformer-lm")


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of every command that uses a trained model."""
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


def positive(options: Any, name: str, *, default: int) -> int:
    """Return an option, or its default where it was not given.

    Raises:
        InputError: It is below 1.
    """
    value: int = default if options[name] is None else options[name]
    if value < 1:
        raise InputError(f"{name} ({value}) must be at least 1")
    return value


def refuse_options(options: Any, names: Sequence[str], *, kind: str) -> None:
    """Check that none of these options was given: they do not apply to this kind of run.

    Raises:
        InputError: One was.
    """
    for name in names:
        if options[name] is not None:
            raise InputError(f"--{name} has no meaning for a run {kind}")
