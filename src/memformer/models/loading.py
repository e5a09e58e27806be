"""Building and loading of models by model type."""

from pathlib import Path

import torch

from memformer.errors import CheckpointError, InputError, InputTypeError
from memformer.models.associative_recurrent_memory_transformer import AssociativeRecurrentMemoryTransformer
from memformer.models.classification_config import MemformerClassificationConfig
from memformer.models.compressive_transformer import CompressiveTransformer
from memformer.models.config import ModelConfig
from memformer.models.hugging_face import find_saved_model
from memformer.models.language_model import LanguageModel
from memformer.models.lstm import LSTM
from memformer.models.memformer import Memformer
from memformer.models.pretrained import CONFIG_FILE
from memformer.models.recurrent_memory_transformer import RecurrentMemoryTransformer
from memformer.models.transformer_xl import TransformerXL
from memformer.utils.checks import Integer
from memformer.utils.files import read_json
from memformer.utils.words import with_article

_CLASSES: tuple[type[LanguageModel], ...] = (
    Memformer,
    LSTM,
    TransformerXL,
    CompressiveTransformer,
    RecurrentMemoryTransformer,
    AssociativeRecurrentMemoryTransformer,
)
# Language model class of each model type; its `config_class` is the class of its config.
MODELS = {model.config_class.model_type: model for model in _CLASSES}


def build_model(config: ModelConfig) -> LanguageModel:
    """Return a new model with random weights, of the config's model type.

    Raises:
        InputTypeError: It is no config of a language model of this library.
    """
    kinds = [model.config_class for model in _CLASSES]
    if not isinstance(config, tuple(kinds)):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise InputTypeError(f"config is {with_article(type(config).__name__)}; a language model has one of {names}")
    return MODELS[config.model_type](config)


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", num_slots: Integer | None = None
) -> LanguageModel:
    """Return the model saved by `save_pretrained`, of any model type, in evaluation mode.

    Args:
        folder: Folder of the saved model, or its name on the Hugging Face hub (see `find_model_folder`).
        device: Device to load the model to.
        num_slots: Number of memory slots to use, for a Memformer only (see `Memformer.from_pretrained`). None: as in
            training.

    Raises:
        CheckpointError: A file is missing or damaged, or this library has no language model of such a type.
        InputError: `num_slots` is given for a model that is not a Memformer, or that cannot change it; the model
            cannot be downloaded; or the device is unknown or not available.
    """
    folder = find_saved_model(folder)
    file = folder / CONFIG_FILE
    model_type = read_json(file).get("model_type")
    if model_type == MemformerClassificationConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a classifier, which predicts no tokens; "
            "MemformerForSequenceClassification.from_pretrained loads it"
        )
    if model_type not in list(MODELS):  # a list, because a damaged file may hold an unhashable value
        raise CheckpointError(f"{file}: model_type ({model_type!r}) must be one of {', '.join(MODELS)}")
    model = MODELS[model_type]
    if num_slots is None:
        return model.from_pretrained(folder, device=device)
    if not issubclass(model, Memformer):
        raise InputError(f"num_slots ({num_slots}) is for a memformer; {folder} holds {with_article(model_type)}")
    return model.from_pretrained(folder, device=device, num_slots=num_slots)
