"""Models as folders: config.json beside model.safetensors; nothing is ever unpickled."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from memformer.errors import CheckpointError, InputError
from memformer.models.config import ModelConfig
from memformer.utils.files import read_json, read_names, read_tensors, write_json, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


# Of every weight, for telling trainings apart: the first update changes nearly all values.
_NUM_FIRST_VALUES = 64

# Not typing.Self: the run-time checks of the tests do not know it in a class method.
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Saving and loading for a model that is built from its config alone."""

    config: Any
    config_class: ClassVar[type[ModelConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; each appears whole or not at all.

        Raises:
            SaveError: Writing failed; files that were there before are intact.
        """
        folder = Path(folder)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        write_json(folder / CONFIG_FILE, {"model_type": self.config.model_type, **self.config.to_dict()})

    def fingerprint(self) -> str:
        """Return a hash of the config and of the first values of every weight: it tells trainings apart, in no time.

        Weights of another dtype that hold the same values in float32 have the same fingerprint.
        """
        changed = {name: value for name, value in self.config.to_dict().items() if value != _default(self.config, name)}
        digest = hashlib.sha256(json.dumps([self.config.model_type, changed], sort_keys=True).encode())
        first = [weight.detach().flatten()[:_NUM_FIRST_VALUES].float() for weight in self.parameters()]
        digest.update(torch.cat(first).cpu().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path, *, device: torch.device | str = "cpu") -> Model:
        """Return the model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: Where it was saved.
            device: Where it goes.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
        """
        return cls._read_weights(folder, cls._read_config(folder), device=device)

    @classmethod
    def _read_config(cls, folder: str | Path) -> Any:
        """Return the config in a folder.

        Raises:
            CheckpointError: It is missing, damaged, or of another model.
        """
        file = Path(folder) / CONFIG_FILE
        fields = read_json(file)
        found, expected = fields.pop("model_type", None), cls.config_class.model_type
        if found != expected:
            raise CheckpointError(f"{file} does not describe a {expected}: model_type is {found!r}, not {expected!r}")
        try:
            return cls.config_class.from_dict(fields)
        except InputError as error:
            raise CheckpointError(f"{file}: {error}") from error

    @classmethod
    def _read_weights(cls: type[Model], folder: str | Path, config: Any, *, device: torch.device | str) -> Model:
        """Return a model of this config with the weights in a folder.

        Raises:
            CheckpointError: They are missing, damaged, or of another model.
        """
        file = Path(folder) / WEIGHTS_FILE
        names = read_names(file)
        for stack, asked in cls._count_layers(config).items():
            start = f"{stack}."
            found = len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})
            if asked != found:
                raise CheckpointError(f"{file} has {found} {stack.replace('.', ' ')}; its config says {asked}")
        # Shapes are compared before memory is taken for them: a damaged config may ask for any amount.
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, file)
        return model.to(device).eval()

    @classmethod
    def _count_layers(cls, config: Any) -> Mapping[str, int]:
        """Return the number of layers that a config asks for in each stack, by what their weights' names begin with."""
        raise NotImplementedError


def _default(config: ModelConfig, name: str) -> Any:
    value = getattr(type(config), name, None)
    return list(value) if isinstance(value, tuple) else value


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model of exactly its names and shapes; floating dtypes follow the file.

    Raises:
        CheckpointError: The file is missing, damaged, or of another model; the model is as it was.
    """
    tensors = read_weights(model, file)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(tensors, assign=is_empty)


def read_weights(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file that has exactly a model's names and shapes.

    Raises:
        CheckpointError: The file is missing, damaged, or of another model.
    """
    tensors = read_tensors(file)
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{file} lacks {len(missing)} tensors of this model, {missing[0]!r} first")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{file} holds {len(extra)} tensors this model does not have, {extra[0]!r} first")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensor.shape)}; this model's is {tuple(expected[name].shape)}"
            )
    return tensors
