"""The shapes of the models that the paper compares the Memformer with."""

from dataclasses import dataclass
from typing import ClassVar

from memformer.config import ModelConfig, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(ModelConfig):
    """Everything that decides what an LSTM computes.

    Args:
        num_layers: Layers, each of width D.
    """

    model_type: ClassVar[str] = "lstm"

    num_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_layers=1)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """What the config of every model made of one stack of attention layers has.

    Args:
        num_layers: Layers of self-attention and feed-forward.
    """

    num_layers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_layers=1)


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(DecoderConfig):
    """Everything that decides what a Transformer-XL computes.

    Args:
        memory_length: Tokens M before the segment that every layer attends to. 0 attends within the segment alone: with
            segments as long as the documents that is the plain Transformer decoder.
    """

    model_type: ClassVar[str] = "transformer_xl"

    memory_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(memory_length=0)
