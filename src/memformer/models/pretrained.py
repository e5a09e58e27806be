"""Saving and loading of models as folders with config.json and model.safetensors; nothing is unpickled."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memformer.errors import CheckpointError, InputError
from memformer.models.config import ModelConfig
from memformer.models.hugging_face import SHARD_INDEX_FILE, WEIGHTS_PREFIX, find_saved_model, without_foreign_keys
from memformer.utils.checks import check_type
from memformer.utils.files import read_json, read_names, read_tensors, user_path, write_json, write_tensors
from memformer.utils.machine import check_device
from memformer.utils.renames import TENSORS, first_default, first_model_field, update_section, with_first_defaults
from memformer.utils.words import with_article

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


# Leading values of every weight in the fingerprint: the first update of a training run changes nearly all values.
_NUM_FIRST_VALUES = 64

# Not typing.Self: the run-time type checker of the tests does not support it in class methods.
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Base class that saves and loads a model built from its config alone."""

    config: Any
    config_class: ClassVar[type[ModelConfig]]

    def __init__(self, config: Any) -> None:
        check_type("config", config, self.config_class)
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; each is written completely or not at all.

        Weights that share memory are written once for each name; the loaded model has a copy for each.

        Raises:
            InputError: Weights are parametrized or pruned, or modules were changed otherwise: a model of this config
                could not load them.
            SaveError: Writing failed; earlier files are intact.
        """
        self.check_weights_are_of_config()
        folder = user_path(folder)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        write_json(folder / CONFIG_FILE, {"model_type": self.config.model_type, **self.config.to_dict()})

    def check_weights_are_of_config(self) -> None:
        """Check that a model made from the config has weights of the same names, so that it can load these.

        Raises:
            InputError: A weight is parametrized, missing or added.
        """
        for name, module in self.named_modules():
            if parametrize.is_parametrized(module):
                raise InputError(
                    f"{name} has parametrized weights, which a loaded model would lack; call "
                    "torch.nn.utils.parametrize.remove_parametrizations first, or save the state_dict"
                )
        expected = self._names_of_weights()
        if expected is not None and (different := sorted(self.state_dict().keys() ^ expected)):
            raise InputError(
                f"the model's weights are not those of its config: {different[0]} is "
                f"{'missing' if different[0] in expected else 'added'}, as by pruning or weight normalization; undo "
                "the change (for example with torch.nn.utils.prune.remove), or save the state_dict"
            )

    def _names_of_weights(self) -> set[str] | None:
        """Return the names of the weights of a model of this config; None if the class is not made from it alone."""
        try:
            with torch.device("meta"):
                return set(type(self)(self.config).state_dict())
        except (TypeError, InputError):
            return None

    def fingerprint(self) -> str:
        """Return a hash of the config and the first values of every weight: a fast way to distinguish trained models.

        Weights of different dtypes have the same fingerprint if their float32 values are equal.
        """
        changed = dict(
            first_model_field(name, value)
            for name, value in self.config.to_dict().items()
            if value != _first_default(self.config, name)
        )
        digest = hashlib.sha256(json.dumps([self.config.model_type, changed], sort_keys=True).encode())
        # A weight that several layers share counts for each: once saved and loaded, each has its own.
        weights = [weight for _, weight in self.named_parameters(remove_duplicate=False)]
        first = [weight.detach().flatten()[:_NUM_FIRST_VALUES].float() for weight in weights]
        digest.update(torch.cat(first).cpu().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path, *, device: torch.device | str = "cpu") -> Model:
        """Return the model saved by `save_pretrained`, of this package or of transformers, in evaluation mode.

        Args:
            folder: Folder of the saved model, or its name on the Hugging Face hub, `owner/name` or
                `owner/name@revision` (see `models.hugging_face.find_model_folder`).
            device: Device to load the model to.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
            InputError: The model cannot be downloaded, or the device is unknown or not available.
        """
        folder = find_saved_model(folder)
        return cls._read_weights(folder, cls._read_config(folder), device=device)

    @classmethod
    def _read_config(cls, folder: str | Path) -> Any:
        """Return the config in a folder.

        Raises:
            CheckpointError: The config is missing, damaged, or of another model.
        """
        file = user_path(folder) / CONFIG_FILE
        fields = without_foreign_keys(read_json(file))
        found, expected = fields.pop("model_type", None), cls.config_class.model_type
        if found != expected:
            raise CheckpointError(
                f"{file} does not describe {with_article(expected)}: model_type is {found!r}, not {expected!r}"
            )
        try:
            # The library itself wrote these names, so old ones need no warning.
            updated = with_first_defaults(expected, update_section("model", fields)[0])
            return cls.config_class.from_dict(updated)
        except InputError as error:
            raise CheckpointError(f"{file}: {error}") from error

    @classmethod
    def _read_weights(cls: type[Model], folder: str | Path, config: Any, *, device: torch.device | str) -> Model:
        """Return a model with this config and the weights in a folder.

        Raises:
            CheckpointError: The weights are missing, damaged, or of another model.
            InputError: The device is unknown or not available.
        """
        check_device(device)
        folder = user_path(folder)
        file = folder / WEIGHTS_FILE
        if not file.exists() and (folder / SHARD_INDEX_FILE).exists():
            raise CheckpointError(
                f"{folder} has weights in several files; save the model again with a larger max_shard_size"
            )
        names = [_present_name(name) for name in read_names(file)]
        for stack, expected in cls._count_layers(config).items():
            start = f"{stack}."
            found = len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})
            if found != expected:
                raise CheckpointError(f"{file} has {found} {stack.replace('.', ' ')}; its config says {expected}")
        # Shapes are compared before memory is allocated: a damaged config may request any amount.
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, file)
        return model.to(device).eval()

    @classmethod
    def _count_layers(cls, config: Any) -> Mapping[str, int]:
        """Return the number of layers of each stack in a config; keys are the name prefixes of their weights."""
        raise NotImplementedError  # every model defines it


def _first_default(config: ModelConfig, name: str) -> Any:
    value = first_default(config.model_type, name, default=getattr(type(config), name, None))
    return list(value) if isinstance(value, tuple) else value


def _present_name(name: str) -> str:
    name = name.removeprefix(WEIGHTS_PREFIX)
    return TENSORS.get(name, name)


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model with exactly its names and shapes; floating dtypes follow the file.

    Raises:
        CheckpointError: The file is missing, damaged, or of another model; the model is unchanged.
    """
    tensors = read_weights(model, file)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(tensors, assign=is_empty)


def read_weights(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which must have exactly the model's names and shapes.

    Raises:
        CheckpointError: The file is missing, damaged, or of another model.
    """
    tensors = {_present_name(name): tensor for name, tensor in read_tensors(file).items()}
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{file} lacks {len(missing)} tensors of this model; the first is {missing[0]!r}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{file} has {len(extra)} tensors that this model lacks; the first is {extra[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensor.shape)}; this model's is {tuple(expected[name].shape)}"
            )
    return tensors
