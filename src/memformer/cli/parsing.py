"""Argument parsers: the help comes from the dataclass docstrings, and every invalid input gives one error line."""

import contextlib
import dataclasses
import difflib
import json
import re
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from memformer.errors import InputError
from memformer.utils.checks import check_integer
from memformer.utils.fields import VERBATIM, convert_text, is_text
from memformer.utils.yaml_files import parse_yaml

_DERIVED_OPTIONS = ("--model.vocab_size", "--model.num_special_tokens")


# The parser reads YAML, which writes these numbers in another way than JSON.
_YAML_NUMBERS = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}
_NULLS = {"", "~", "null", "Null", "NULL"}
_SLICE_FROM_THE_END = re.compile(r"-\d*:(-?\d+)?")


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


def parse(parser: ArgumentParser, argv: Sequence[str], *, sections: Mapping[str, Any] | None = None) -> Namespace:
    """Return the parsed arguments, with the dataclasses instantiated.

    Args:
        parser: The parser.
        argv: The arguments.
        sections: Dataclasses of sections whose messages do not say which section it is, by the name of the section.

    Raises:
        InputError: An argument is unknown (the nearest valid one is named) or has the wrong type.
    """
    try:
        found = parser.parse_args(_convert_options(parser, argv))
        for name, kind in (sections or {}).items():
            _check_section(name, kind, found.get(name))
        return parser.instantiate(found)
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:
        raise InputError(_explain(error, parser, argv)) from error


def _check_section(name: str, kind: Any, section: Namespace | None) -> None:
    try:
        if section is not None:
            kind(**section.as_dict())
    except InputError as error:
        first = str(error).split(maxsplit=1)[0]
        begins_with_key = first in {field.name for field in dataclasses.fields(kind)}
        raise InputError(f"{name}.{error}" if begins_with_key else f"{name}: {error}") from error


def _convert_options(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return the options with all numbers and truth values as the parser reads them ("1e3" becomes "1000").

    Raises:
        InputError: A value has the wrong type. The parser's own message would describe Python's types.
    """
    converted: list[str] = []
    hint: Any = None
    takes_several = False
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            hint, takes_several = _type_of(parser, name)
            converted.append(f"{name}={_convert_word(name, value, hint)}" if equals else word)
            hint = None if equals else hint
        elif _SLICE_FROM_THE_END.fullmatch(word) and hint is not None and converted[-1] == name:
            # On its own, a value that begins with a minus would be taken for an option.
            converted[-1] = f"{name}={_convert_word(name, word, hint)}"
            hint = None
        else:
            converted.append(_convert_word(name, word, hint))
            hint = hint if takes_several else None
    return converted


def _convert_word(option: str, word: str, hint: Any) -> str:
    """Return the value of an option, checked if its type is not a text; None as the type: unchanged."""
    is_choice = get_origin(hint) is Literal
    if hint is None or hint is str:
        return word
    if is_text(hint) and not is_choice:
        return _convert_text_word(option, word, hint)
    value = convert_text(option.removeprefix("--"), word, hint)
    if is_choice:
        return word
    text = json.dumps(value)
    return _YAML_NUMBERS.get(text, text)


def _convert_text_word(option: str, word: str, hint: Any) -> str:
    """Return the value of an option for a text, texts or None in a form that the parser, which reads YAML, takes.

    Only null and nothing are None, and only what is in brackets is a list, if the option takes one.
    """
    kinds = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    if word.strip() in _NULLS and type(None) in kinds:
        return word
    if any(get_origin(kind) is list for kind in kinds):
        found = None
        with contextlib.suppress(ValueError):
            found = parse_yaml(word) if word.lstrip().startswith("[") else None
        if isinstance(found, list):
            return json.dumps(convert_text(option.removeprefix("--"), found, hint))
        if str not in kinds:
            return json.dumps([each.strip() for each in word.split(",")])
    return VERBATIM + word


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
        fields = [field for kind in _sections(hint) for field in dataclasses.fields(kind)]
        hint = next((field.type for field in fields if field.name == key), None)
    if keys and hint is str:
        hint = str | None  # read as YAML, unlike a text outside an optional section
    return (None if _sections(hint) else hint), action is not None and action.nargs == "+"


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
    keys = _keys(getattr(action, "_typehint", None))
    return [*action.option_strings, *(f"{option}.{key}" for option in action.option_strings for key in keys)]


def _keys(hint: Any) -> list[str]:
    """Return the keys of an optional section, with those of the sections in it, as `curriculum.window`."""
    found = []
    for section in _sections(hint):
        for field in dataclasses.fields(section):
            found += [field.name, *(f"{field.name}.{key}" for key in _keys(field.type))]
    return found


def _sections(hint: Any) -> list[Any]:
    """Return the dataclasses that an annotation allows."""
    return [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]


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
