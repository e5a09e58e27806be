"""Registration of the models with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from memformer.hf.modeling import RecurrentForCausalLM, RecurrentHiddenModel
from memformer.hf.models import (
    AssociativeRecurrentMemoryTransformerForCausalLM,
    AssociativeRecurrentMemoryTransformerModel,
    CompressiveTransformerForCausalLM,
    CompressiveTransformerModel,
    LSTMForCausalLM,
    LSTMModel,
    MemformerForCausalLM,
    MemformerModel,
    RecurrentMemoryTransformerForCausalLM,
    RecurrentMemoryTransformerModel,
    TransformerXLForCausalLM,
    TransformerXLModel,
)
from memformer.hf.tokenization import MemformerTokenizer
from memformer.models import LanguageModel
from memformer.utils.checks import check_type

CAUSAL_MODELS: tuple[type[RecurrentForCausalLM], ...] = (
    MemformerForCausalLM,
    LSTMForCausalLM,
    TransformerXLForCausalLM,
    CompressiveTransformerForCausalLM,
    RecurrentMemoryTransformerForCausalLM,
    AssociativeRecurrentMemoryTransformerForCausalLM,
)
HIDDEN_MODELS: tuple[type[RecurrentHiddenModel], ...] = (
    MemformerModel,
    LSTMModel,
    TransformerXLModel,
    CompressiveTransformerModel,
    RecurrentMemoryTransformerModel,
    AssociativeRecurrentMemoryTransformerModel,
)


def register() -> None:
    """Register every model type; doing it again changes nothing."""
    for model in CAUSAL_MODELS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        AutoTokenizer.register(model.config_class, MemformerTokenizer, exist_ok=True)
    for hidden_model in HIDDEN_MODELS:
        AutoModel.register(hidden_model.config_class, hidden_model, exist_ok=True)


def as_causal_lm(model: LanguageModel) -> RecurrentForCausalLM:
    """Return a causal language model of transformers around a model of this library; both have the same weights.

    Raises:
        InputTypeError: `model` is not a language model of this library.
    """
    check_type("model", model, LanguageModel)
    classes = {causal.config_class.model_type: causal for causal in CAUSAL_MODELS}
    wrapped: RecurrentForCausalLM = classes[model.config.model_type].from_core(model)
    return wrapped
