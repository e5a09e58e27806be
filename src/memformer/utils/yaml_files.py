"""Safe parsing of user-written YAML, with one-line error messages."""

import re
from pathlib import Path
from typing import Any

import yaml

from memformer.errors import InputError
from memformer.utils.words import with_article

_INTEGER = re.compile("(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
_NUMBER = re.compile(
    r"(?:[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_INTEGER_TAG, _NUMBER_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does, and refuses a key that stands twice in a mapping.

    In YAML 1.1, which PyYAML reads, 010 is 8, 1:10 is 70 and 1e-3 is a text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping in a node.

        Raises:
            ConstructorError: A key stands twice.
        """
        seen = set()
        for key, _ in node.value:
            # Keys that are merged (<<) may be given again.
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


# Without the numbers of YAML 1.1.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {_INTEGER_TAG, _NUMBER_TAG}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INTEGER_TAG, _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or 1.2 reads as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_INTEGER_TAG, _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver(_NUMBER_TAG, _NUMBER, list("-+.0123456789"))


def to_yaml(fields: dict[str, Any]) -> str:
    """Return plain values as a YAML text, which `read_yaml` reads as the same values."""
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Return the value in a YAML text.

    Raises:
        ValueError: The text is not valid YAML; the message is one line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML raises these for malformed numbers, dates and tagged values, and for nesting that is too deep.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"a value in it is malformed: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: The file is missing, is not YAML, or does not contain a mapping.
    """
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"config {path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        kind = {type(None): "nothing", str: "a text"}.get(type(value), with_article(type(value).__name__))
        raise InputError(f"config {path} holds {kind}; it must be a mapping of keys to values")
    return value
