"""The shapes of the models that the paper compares the Memformer with."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from memformer.errors import InputError
from memformer.models.config import ModelConfig, TransformerConfig
from memformer.utils.checks import LARGEST, check_number

Compression = Literal["convolution", "mean"]


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


@dataclass(frozen=True, kw_only=True)
class CompressiveTransformerConfig(TransformerXLConfig):
    """Everything that decides what a Compressive Transformer computes, beside what decides it of a Transformer-XL.

    Args:
        compressed_length: Compressed memories C before the memory that every layer attends to as well.
        compression_rate: Tokens c that become one compressed memory.
        compression: What makes one of them: "convolution", learned, or "mean".
        reconstruction_weight: Factor on the loss that the convolution learns by.
    """

    model_type: ClassVar[str] = "compressive_transformer"

    compressed_length: int = 128
    compression_rate: int = 4
    compression: Compression = "convolution"
    reconstruction_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(compressed_length=1, compression_rate=1)
        if self.memory_length < self.compression_rate:
            raise InputError(
                f"memory_length ({self.memory_length}) must be at least compression_rate ({self.compression_rate}): "
                "tokens are compressed when so many can leave"
            )
        if self.compression_rate * self.d_model > LARGEST:
            raise InputError(
                f"compression_rate ({self.compression_rate}) times d_model ({self.d_model}) must be at most {LARGEST}"
            )
        if self.compression not in get_args(Compression):
            raise InputError(f"compression ({self.compression!r}) must be one of {', '.join(get_args(Compression))}")
        check_number("reconstruction_weight", self.reconstruction_weight)
        if not 0 <= self.reconstruction_weight < float("inf"):
            raise InputError(f"reconstruction_weight ({self.reconstruction_weight}) must be at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class RecurrentMemoryTransformerConfig(DecoderConfig):
    """Everything that decides what a Recurrent Memory Transformer computes.

    Args:
        num_memory_tokens: Memory tokens M that are read before a segment and written after it.
    """

    model_type: ClassVar[str] = "recurrent_memory_transformer"

    num_memory_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_memory_tokens=1)
        self._check_rotary()
