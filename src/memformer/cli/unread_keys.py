"""Removes the keys of a config that the model or the kind of data chosen on the command line does not read.

With `--model_type transformer_xl`, the config of a Memformer can be used as it stands: the keys that only a Memformer
reads are left out. The same holds for another `kind` of a source or tokenizer and for another recall task.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from memformer.data.recall.config import RecallConfig, keys_of_task
from memformer.data.sources import SourceConfig, keys_of_kind
from memformer.data.tokenizer_training import TokenizerConfig
from memformer.models.config import MemformerConfig
from memformer.models.loading import MODELS
from memformer.training.config import SOURCES, DataConfig, unread_data_keys

# Keys outside `model` that need a Memformer, with their values for other models.
_MEMFORMER_ONLY: dict[str, Any] = {"write_penalty": 0.0, "compiled": False, "sharding": "none"}


def option_value(options: Sequence[str], name: str) -> str | None:
    """Return the value that the command line gives an option such as `--model_type`; None if it is not given."""
    found = None
    for option, following in zip_longest(options, options[1:]):
        own, equals, value = option.partition("=")
        if own == name:
            found = value if equals else following
    return found


def drop_unread_keys(given: dict[str, Any], options: Sequence[str], *, owner: str) -> str | None:
    """Remove the unread keys from a config, in place, and return a warning that names them; None if there are none.

    Only keys of the config's own model or kind are removed, so a misspelt key is still found.

    Args:
        given: The config as plain values.
        options: The options of the command line.
        owner: Name of the config in the warning.
    """
    notes = _drop_of_model(given, option_value(options, "--model_type"), options)
    data = given.get("data")
    if isinstance(data, dict):
        for section in SOURCES:
            notes += _drop_of_kind(data.get(section), f"data.{section}", "kind", SourceConfig, options)
        notes += _drop_of_kind(data.get("tokenizer"), "data.tokenizer", "kind", TokenizerConfig, options)
        notes += _drop_of_kind(data.get("recall"), "data.recall", "task", RecallConfig, options)
        notes += _drop_of_data(data, options)
    return f"{owner}: {'; '.join(notes)}" if notes else None


def _drop_of_model(given: dict[str, Any], chosen: str | None, options: Sequence[str]) -> list[str]:
    before = given.get("model_type", MemformerConfig.model_type)
    model = given.get("model")
    if chosen is None or chosen == before or chosen not in MODELS or before not in list(MODELS):
        return []
    old, new = _defaults(MODELS[before].config_class), _defaults(MODELS[chosen].config_class)
    dropped = []
    if isinstance(model, dict):
        unread = [key for key in model if (key in old or key == "preset") and key not in new]
        removed = {key: model.pop(key) for key in unread}
        dropped = [f"model.{key}" for key, value in removed.items() if _plain(value) != _plain(old.get(key))]
    training = given.get("training")
    if isinstance(training, dict) and chosen != MemformerConfig.model_type:
        unread = [key for key, off in _MEMFORMER_ONLY.items() if training.get(key, off) != off]
        dropped += [f"training.{key}" for key in unread if training.pop(key) is not None]
    notes = [f"model_type {chosen} does not read {', '.join(dropped)}"] if dropped else []
    # The sizes of the other model, which the config cannot name.
    sizes = {key: size for key, size in new.items() if key not in old and type(size) is int and size}
    unset = [f"{key} {size}" for key, size in sizes.items() if option_value(options, f"--model.{key}") is None]
    return [*notes, f"its defaults are {', '.join(unset)}"] if notes and unset else notes


def _drop_of_kind(section: object, name: str, key: str, config: type, options: Sequence[str]) -> list[str]:
    chosen = option_value(options, f"--{name}.{key}")
    if not isinstance(section, dict) or chosen is None:
        return []
    defaults = _defaults(config)
    readable = {SourceConfig: keys_of_kind, RecallConfig: keys_of_task, TokenizerConfig: _keys_of_tokenizer}
    if chosen == section.get(key, defaults[key]):
        return []
    unread = [each for each in section if each in defaults and each not in readable[config](chosen)]
    removed = {each: section.pop(each) for each in unread}
    dropped = [f"{name}.{each}" for each, value in removed.items() if _plain(value) != _plain(defaults[each])]
    return [f"{name}.{key} {chosen} does not read {', '.join(dropped)}"] if dropped else []


def _drop_of_data(data: dict[str, Any], options: Sequence[str]) -> list[str]:
    kind, task = (option_value(options, name) for name in ("--data.train.kind", "--data.recall.task"))
    removed = {key: data.pop(key) for key in unread_data_keys(kind=kind or "", task=task) if key in data}
    defaults = dataclasses.asdict(DataConfig())
    dropped = [f"data.{key}" for key, value in removed.items() if _differs(value, defaults[key])]
    chosen = f"data.train.kind {kind}" if task is None else f"data.recall.task {task}"
    return [f"{chosen} does not read {', '.join(dropped)}"] if dropped else []


def _differs(value: object, default: object) -> bool:
    """Return whether a value of a config, or of one of its sections, is not the default."""
    if isinstance(value, dict) and isinstance(default, dict):
        return any(_differs(each, default.get(key)) for key, each in value.items())
    return _plain(value) != _plain(default)


def _keys_of_tokenizer(kind: str) -> frozenset[str]:
    own = {"bpe": {"vocab_size"}, "word": {"vocab_size"}, "pretrained": {"path"}, "bins": {"num_bins", "spacing"}}
    return frozenset({"kind", *own.get(kind, ())})


def _defaults(config: Any) -> Mapping[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
