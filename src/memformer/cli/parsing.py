"""Argument parsers: the help comes from the dataclass docstrings, and every invalid input gives one error line."""

import dataclasses
import difflib
import importlib.metadata
import json
import re
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from memformer.errors import InputError
from memformer.utils.checks import check_integer
from memformer.utils.fields import convert_text, is_text

_DERIVED_OPTIONS = ("--model.vocab_size", "--model.num_special_tokens")


# The parser reads YAML, which writes these numbers in another way than JSON.
_YAML_NUMBERS = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}


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
        return parser.instantiate(parser.parse_args(_convert_options(parser, argv)))
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:
        raise InputError(_explain(error, parser, argv)) from error


def _convert_options(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return the options with all numbers and truth values as the parser reads them ("1e3" becomes "1000").

    Raises:
        InputError: A value has the wrong type. The parser's own message would describe Python's types.
    """
    converted: list[str] = []
    hint: Any = None
    takes_several = is_nested = False
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            hint, takes_several = _type_of(parser, name)
            is_nested = all(name not in action.option_strings for action in parser._actions)
            value = _protect(value) if is_nested else value
            converted.append(f"{name}={_convert_word(name, value, hint)}" if equals else word)
            hint = None if equals else hint
        else:
            converted.append(_convert_word(name, _protect(word) if is_nested else word, hint))
            hint = hint if takes_several else None
    return converted


def _protect(word: str) -> str:
    """Return a value of an optional section, which the parser reads as YAML, so that a slice is not a mapping there.

    No YAML begins with a tab, so the parser takes the text as it stands.
    """
    return f"\t{word}" if re.fullmatch(r"-?\d+:", word) else word


def _convert_word(option: str, word: str, hint: Any) -> str:
    """Return the value of an option, checked if its type is not a text; None as the type: unchanged."""
    if get_origin(hint) is list and is_text(hint) and not word.lstrip().startswith("["):
        return json.dumps(word.split(","))  # the parser reads lists as YAML only
    is_choice = get_origin(hint) is Literal
    if hint is None or (is_text(hint) and not is_choice):
        return word
    value = convert_text(option.removeprefix("--"), word, hint)
    if is_choice:
        return word
    text = json.dumps(value)
    return _YAML_NUMBERS.get(text, text)


def _type_of(parser: ArgumentParser, option: str) -> tuple[Any, bool]:
    """Return the type of an option (None: it is not known here) and whether it takes several values."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    action, keys = actions.get(option), list[str]()
    while action is None and "." in option:
        # The fields of an optional section (data.validation) have no actions of their own.
        option, _, key = option.rpartition(".")
        action, keys = actions.get(option), [key, *keys]
    hint = getattr(action, "_typehint", None)
    for key in keys:
        sections = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        hint = next((field.type for kind in sections for field in dataclasses.fields(kind) if field.name == key), None)
    has_section = any(dataclasses.is_dataclass(kind) for kind in (hint, *get_args(hint)))
    return (None if has_section else hint), action is not None and action.nargs == "+"


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
    message = " ".join(str(cause or error).split())
    if cause is None and (section := re.match(r'Parser key "([^"]+)": ', message)):
        # A whole section as one value, for example --model "{num_slots: many}".
        return f"{section[1]} must be a mapping of its keys to valid values; --{section[1]}.KEY sets a single key"
    return message


def _options(action: Action) -> list[str]:
    # The parser does not list the fields of an optional nested dataclass; their parent option accepts them.
    kinds = get_args(getattr(action, "_typehint", None))
    fields = [field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    return [*action.option_strings, *(f"{option}.{name}" for option in action.option_strings for name in fields)]


def version() -> str:
    """Return the installed version of the package."""
    return importlib.metadata.version("memformer-lm")


_JSON_HELP = "Print the result to stdout as one JSON object."


def add_run_arguments(parser: ArgumentParser, *, json_help: str = _JSON_HELP) -> None:
    """Add the arguments shared by all commands that compute with a trained model."""
    add_model_arguments(parser, json_help=json_help)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if available), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads of torch. Default: as in training."
    )


def add_model_arguments(parser: ArgumentParser, *, json_help: str = _JSON_HELP) -> None:
    """Add the arguments that choose a trained model, and --json."""
    parser.add_argument(
        "run",
        type=str,
        help="Run folder, a folder from save_pretrained, or the name of a model on the Hugging Face hub "
        "(owner/name or owner/name@revision).",
    )
    parser.add_argument("--json", action="store_true", help=json_help)
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
