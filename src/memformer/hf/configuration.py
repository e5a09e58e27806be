"""Configs of transformers, generated from the configs of this library: the same fields with the same defaults."""

import dataclasses
import os
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig

from memformer.errors import InputError
from memformer.hf.remote_code import write_remote_code
from memformer.models.baseline_configs import (
    AssociativeRecurrentMemoryTransformerConfig,
    CompressiveTransformerConfig,
    LSTMConfig,
    RecurrentMemoryTransformerConfig,
    TransformerXLConfig,
)
from memformer.models.config import MemformerConfig, ModelConfig
from memformer.utils.renames import is_old_model_key, update_section, with_first_defaults

# Not typing.Self: the run-time type checker of the tests does not support it in class methods.
HFConfig = TypeVar("HFConfig", bound="RecurrentHFConfig")


class RecurrentHFConfig(PreTrainedConfig):
    """Base class of the generated configs.

    As in the library's own config, `vocab_size` counts the token ids that can be predicted (V). `[BOS]` is token id V,
    and any special tokens follow it: logits have a column for each of these ids too, which is never the largest.

    Args:
        bos_token_id: Token id of `[BOS]`. None: V.
        pad_token_id: Token id of padding. None: V, which is never read.
        eos_token_id: Token id that ends a document, if the model was trained to predict one.
        use_cache: What `forward` does if it is called without `use_cache`. True: return the state, except in
            training. None or False: only if a `cache` is given.
    """

    core_class: ClassVar[type[ModelConfig]]
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields; names from version 0.1 are converted.

        Raises:
            InputError: A value is out of range, or a field is given under its old name and, with a value that is not
                the default, under its new one.
            InputTypeError: A value has the wrong type.
        """
        old = {name: kwargs.pop(name) for name in list(kwargs) if is_old_model_key(name)}
        if old:
            values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self.core_class)}
            given = {name: value for name, value in values.items() if value != getattr(type(self), name)}
            for name, value in update_section("model", given | old)[0].items():
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        for name, value in self.core().to_dict().items():
            setattr(self, name, value)
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, self.vocab_size)
        check_end_token(self.eos_token_id, vocab_size=self.vocab_size)

    @classmethod
    def from_dict(cls: type[HFConfig], config_dict: dict[str, Any], **kwargs: Any) -> HFConfig:
        """Return the config of a saved config.json; fields that it did not have yet get the values of that time.

        With another `vocab_size`, the ids of `[BOS]` and padding that were the saved one become the new one.

        Raises:
            InputError: A value is out of range.
            InputTypeError: A value has the wrong type.
        """
        fields = with_first_defaults(cls.model_type, config_dict)
        if "vocab_size" in kwargs:
            saved = fields.get("vocab_size")
            special = {name: None for name in ("bos_token_id", "pad_token_id") if fields.get(name) == saved}
            fields = {**fields, **special, "vocab_size": kwargs["vocab_size"]}
        return super().from_dict(fields, **kwargs)

    @classmethod
    def from_json_file(cls: type[HFConfig], json_file: str | os.PathLike[str]) -> HFConfig:
        """Return the config in a JSON file, as `from_dict` does.

        Raises:
            InputError: A value is out of range.
            InputTypeError: A value has the wrong type.
        """
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would save a copy of this library's code; see `save_pretrained`."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the config, with the code that an `auto_map` names (see `write_remote_code`)."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(save_directory, getattr(self, "auto_map", None) or {})

    def core(self) -> ModelConfig:
        """Return the library's config with the same fields.

        Raises:
            InputError: A value is out of range.
            InputTypeError: A value has the wrong type.
        """
        names = [field.name for field in dataclasses.fields(self.core_class)]
        return self.core_class.from_dict({name: getattr(self, name) for name in names})

    def validate(self) -> None:
        """Check the fields before saving; transformers' own check knows only tokens that can be predicted.

        Raises:
            InputError: A value is out of range.
            InputTypeError: A value has the wrong type.
        """
        self.core()

    @property
    def num_token_ids(self) -> int:
        """Number of token ids that can be inputs: V, `[BOS]` and special tokens; the number of columns of logits."""
        return int(self.vocab_size) + 1 + int(getattr(self, "num_special_tokens", 0))


def check_end_token(eos_token_id: int | list[int] | None, *, vocab_size: int) -> None:
    """Check that the tokens that end a document can be predicted.

    Raises:
        InputError: One of them is not from 0 to V - 1; `[BOS]` and padding are V, so it would be taken for them.
    """
    ids = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    for each in ids:
        if each < 0:
            raise InputError(f"eos_token_id ({each}) must not be negative")
        if each >= vocab_size:
            raise InputError(
                f"eos_token_id ({each}) must be below vocab_size ({vocab_size}), the number of tokens that are "
                "predicted; for a tokenizer of memformer.hf.as_hf_tokenizer, vocab_size is tokenizer.bos_token_id"
            )


def check_vocabulary(config: RecurrentHFConfig, core: ModelConfig) -> None:
    """Check that a config still counts the tokens of its model.

    Raises:
        InputError: It does not.
    """
    if config.vocab_size != core.vocab_size:
        raise InputError(
            f"config.vocab_size ({config.vocab_size}) was changed: the model predicts {core.vocab_size} tokens, and "
            "its vocabulary cannot be resized"
        )


def _config_class(name: str, core_class: type[ModelConfig]) -> type[RecurrentHFConfig]:
    """Return a config class of transformers with the fields and defaults of one of this library."""
    core_fields = dataclasses.fields(core_class)
    names = {field.name for field in core_fields}
    aliases = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_decoder_layers" if "num_decoder_layers" in names else "num_layers",
    }
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Config of transformers with the fields of {core_class.__name__}.",
        # Values are checked and converted by `core_class`, which accepts any number type.
        "__annotations__": dict.fromkeys([field.name for field in core_fields], Any),
        "model_type": core_class.model_type,
        "core_class": core_class,
        "attribute_map": {alias: field for alias, field in aliases.items() if field in names},
    }
    return type(name, (RecurrentHFConfig,), body | {field.name: field.default for field in core_fields})


MemformerHFConfig = _config_class("MemformerHFConfig", MemformerConfig)
LSTMHFConfig = _config_class("LSTMHFConfig", LSTMConfig)
TransformerXLHFConfig = _config_class("TransformerXLHFConfig", TransformerXLConfig)
CompressiveTransformerHFConfig = _config_class("CompressiveTransformerHFConfig", CompressiveTransformerConfig)
RecurrentMemoryTransformerHFConfig = _config_class(
    "RecurrentMemoryTransformerHFConfig", RecurrentMemoryTransformerConfig
)
AssociativeRecurrentMemoryTransformerHFConfig = _config_class(
    "AssociativeRecurrentMemoryTransformerHFConfig", AssociativeRecurrentMemoryTransformerConfig
)
