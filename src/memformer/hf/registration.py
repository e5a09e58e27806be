"""Registration of the models with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from memformer.hf.modeling import RecurrentForCausalLM
from memformer.hf.models import HF_MODELS
from memformer.hf.tokenization import MemformerTokenizer
from memformer.models import LanguageModel
from memformer.utils.checks import check_type


def register() -> None:
    """Register every model type; doing it again changes nothing."""
    for hidden, causal in HF_MODELS:
        config = causal.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, hidden, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        AutoTokenizer.register(config, MemformerTokenizer, exist_ok=True)


def as_causal_lm(model: LanguageModel) -> RecurrentForCausalLM:
    """Return a causal language model of transformers around a model of this library; both have the same weights.

    Raises:
        InputTypeError: `model` is not a language model of this library.
    """
    check_type("model", model, LanguageModel)
    classes = {causal.config_class.model_type: causal for _, causal in HF_MODELS}
    wrapped: RecurrentForCausalLM = classes[model.config.model_type].from_core(model)
    return wrapped
