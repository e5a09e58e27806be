"""Models as folders: config.json beside model.safetensors; nothing is ever unpickled."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memformer.config import MemformerConfig
from memformer.errors import CheckpointError, InputError
from memformer.files import read_json, read_names, read_tensors, write_json, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Saving and loading for a model that is built from its config alone."""

    config: Any

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
        write_json(folder / CONFIG_FILE, {"model_type": "memformer", **self.config.to_dict()})

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | Path, *, device: torch.device | str = "cpu", num_slots: int | None = None
    ) -> Model:
        """Return the model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: Where it was saved.
            device: Where it goes.
            num_slots: Memory slots to run with, in place of those trained with; for a model of `exchangeable_slots`.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
            InputError: `num_slots` is given for a model whose slots each have a vector of their own, or is below 1.
        """
        folder = Path(folder)
        fields = read_json(folder / CONFIG_FILE)
        if fields.pop("model_type", None) != "memformer":
            raise CheckpointError(
                f"{folder / CONFIG_FILE} does not describe a memformer: model_type must be 'memformer'"
            )
        try:
            config = MemformerConfig.from_dict(fields)
        except InputError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
        if num_slots is not None:
            config = _with_slots(config, num_slots)
        weights = folder / WEIGHTS_FILE
        _check_layers(config, weights)
        # Shapes are compared before memory is taken for them: a damaged config may ask for any amount.
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, weights)
        return model.to(device).eval()


def _check_layers(config: MemformerConfig, file: Path) -> None:
    names = read_names(file)
    for stack, asked in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        found = len({name.split(".")[2] for name in names if name.startswith(f"{stack}.layers.")})
        if asked != found:
            raise CheckpointError(f"{file} has {found} {stack} layers; its config says {asked}")


def _with_slots(config: MemformerConfig, num_slots: int) -> MemformerConfig:
    if num_slots < 1:
        raise InputError(f"num_slots ({num_slots}) must be at least 1")
    if num_slots != config.num_slots and not config.exchangeable_slots:
        raise InputError(
            f"num_slots ({num_slots}) must be {config.num_slots}, as trained: only slots that share one vector "
            "(exchangeable_slots) can be more or fewer"
        )
    return dataclasses.replace(config, num_slots=num_slots)


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
