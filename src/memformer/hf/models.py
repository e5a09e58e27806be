"""Models of transformers around the models of this library: one class for each model type and task."""

from memformer.hf.configuration import (
    AssociativeRecurrentMemoryTransformerHFConfig,
    CompressiveTransformerHFConfig,
    LSTMHFConfig,
    MemformerHFConfig,
    RecurrentMemoryTransformerHFConfig,
    TransformerXLHFConfig,
)
from memformer.hf.modeling import RecurrentForCausalLM, RecurrentHiddenModel


class MemformerModel(RecurrentHiddenModel):
    """A Memformer's encoder and memory, without the decoder: returns hidden states."""

    config_class = MemformerHFConfig


class MemformerForCausalLM(RecurrentForCausalLM):
    """A Memformer as a language model."""

    config_class = MemformerHFConfig


class LSTMModel(RecurrentHiddenModel):
    """An LSTM without a head."""

    config_class = LSTMHFConfig


class LSTMForCausalLM(RecurrentForCausalLM):
    """An LSTM as a language model."""

    config_class = LSTMHFConfig


class TransformerXLModel(RecurrentHiddenModel):
    """A Transformer-XL without a head."""

    config_class = TransformerXLHFConfig


class TransformerXLForCausalLM(RecurrentForCausalLM):
    """A Transformer-XL as a language model."""

    config_class = TransformerXLHFConfig


class CompressiveTransformerModel(RecurrentHiddenModel):
    """A Compressive Transformer without a head."""

    config_class = CompressiveTransformerHFConfig


class CompressiveTransformerForCausalLM(RecurrentForCausalLM):
    """A Compressive Transformer as a language model."""

    config_class = CompressiveTransformerHFConfig


class RecurrentMemoryTransformerModel(RecurrentHiddenModel):
    """A Recurrent Memory Transformer without a head."""

    config_class = RecurrentMemoryTransformerHFConfig


class RecurrentMemoryTransformerForCausalLM(RecurrentForCausalLM):
    """A Recurrent Memory Transformer as a language model."""

    config_class = RecurrentMemoryTransformerHFConfig


class AssociativeRecurrentMemoryTransformerModel(RecurrentHiddenModel):
    """An Associative Recurrent Memory Transformer without a head."""

    config_class = AssociativeRecurrentMemoryTransformerHFConfig


class AssociativeRecurrentMemoryTransformerForCausalLM(RecurrentForCausalLM):
    """An Associative Recurrent Memory Transformer as a language model."""

    config_class = AssociativeRecurrentMemoryTransformerHFConfig


# The model without a head and the language model of each model type.
HF_MODELS: tuple[tuple[type[RecurrentHiddenModel], type[RecurrentForCausalLM]], ...] = (
    (MemformerModel, MemformerForCausalLM),
    (LSTMModel, LSTMForCausalLM),
    (TransformerXLModel, TransformerXLForCausalLM),
    (CompressiveTransformerModel, CompressiveTransformerForCausalLM),
    (RecurrentMemoryTransformerModel, RecurrentMemoryTransformerForCausalLM),
    (AssociativeRecurrentMemoryTransformerModel, AssociativeRecurrentMemoryTransformerForCausalLM),
)
