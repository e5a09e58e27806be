"""Configs of the models that the Memformer is compared with."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from memformer.errors import InputError
from memformer.models.config import ModelConfig, TransformerConfig
from memformer.utils.checks import LARGEST, check_number

Compression = Literal["convolution", "mean"]


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(ModelConfig):
    """Config of an LSTM.

    Args:
        num_layers: Number of LSTM layers, each of width D.
    """

    model_type: ClassVar[str] = "lstm"

    num_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_layers=1)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """Config fields that all models with a single stack of attention layers share.

    Args:
        num_layers: Number of layers, each of self-attention and feed-forward.
    """

    num_layers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_layers=1)


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(DecoderConfig):
    """Config of a Transformer-XL.

    Args:
        memory_length: Number of tokens M before the segment that every layer attends to. 0: attention within the
            segment only; with segments as long as the documents this is the plain Transformer decoder.
    """

    model_type: ClassVar[str] = "transformer_xl"

    memory_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(memory_length=0)


@dataclass(frozen=True, kw_only=True)
class CompressiveTransformerConfig(TransformerXLConfig):
    """Config of a Compressive Transformer: the fields of a Transformer-XL and those of the compression.

    Args:
        compressed_length: Number of compressed memories C, of the tokens before the memory, that every layer also
            attends to.
        compression_rate: Number of tokens c that are compressed into one compressed memory.
        compression: Compression function: "convolution", which is learned, or "mean".
        reconstruction_weight: Weight of the reconstruction loss, which trains the convolution.
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
                "tokens leave the memory in blocks of compression_rate"
            )
        if self.compression_rate * self.d_model > LARGEST:
            raise InputError(
                f"compression_rate ({self.compression_rate}) times d_model ({self.d_model}) must be at most {LARGEST}"
            )
        check_number("reconstruction_weight", self.reconstruction_weight, minimum=0)


@dataclass(frozen=True, kw_only=True)
class RecurrentMemoryTransformerConfig(DecoderConfig):
    """Config of a Recurrent Memory Transformer.

    Args:
        num_memory_tokens: Number of memory tokens M, which are read before a segment and written after it.
    """

    model_type: ClassVar[str] = "recurrent_memory_transformer"

    num_memory_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_memory_tokens=1)
        self._check_rotary()


@dataclass(frozen=True, kw_only=True)
class AssociativeRecurrentMemoryTransformerConfig(DecoderConfig):
    """Config of an Associative Recurrent Memory Transformer.

    Args:
        num_memory_tokens: Number of memory tokens M, which are written to the associative memories after a segment.
        key_width: Width E of the keys of the associative memories, which have 6 E features each.
    """

    model_type: ClassVar[str] = "associative_recurrent_memory_transformer"

    num_memory_tokens: int = 32
    key_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_memory_tokens=1, key_width=1)
        self._check_rotary()
