"""Model configs: shared base classes and Memformer's. Checked on construction, saved as JSON with the weights."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from memformer.errors import InputError
from memformer.models.presets import preset_fields
from memformer.nn.entmax import Normalizer
from memformer.utils.checks import check_number, check_size, refuse_unknown_keys
from memformer.utils.fields import convert, convert_fields
from memformer.utils.renames import old_names_sentence, update_section

PositionScheme = Literal["rotary", "relative"]
DecoderAttention = Literal["separate", "joint"]
# Not typing.Self: the run-time type checker of the tests does not support it in class methods.
Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Config fields that all models share.

    Args:
        vocab_size: Number of token ids V. Tokens are 0 to V-1; V itself is the built-in `[BOS]`.
        adaptive_cutoffs: For a large vocabulary sorted by frequency: the token ids at which clusters of rarer words
            begin. The embeddings of each cluster are a quarter as wide as those of the cluster before, and rare words
            are predicted in two softmax steps. Empty: one softmax over all tokens. A departure from the paper, which
            does not describe its softmax.
        d_model: Model width D: that of token vectors and, unless `slot_width` is set, of a Memformer's memory slots.
        segment_length: Number of tokens per segment (L in the paper).
        dropout: Dropout probability of the embedded tokens and of the output of every sub-layer.

    Raises:
        InputError: A value is out of range, or two values contradict each other.
        InputTypeError: A value has the wrong type.
    """

    model_type: ClassVar[str]

    vocab_size: int = 256
    adaptive_cutoffs: tuple[int, ...] = ()
    d_model: int = 256
    segment_length: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        convert_fields(self)
        self._check_integers(vocab_size=2, d_model=1, segment_length=1)
        for cutoff in self.adaptive_cutoffs:
            check_size("adaptive_cutoffs", cutoff, 1)
        if list(self.adaptive_cutoffs) != sorted(set(self.adaptive_cutoffs)):
            raise InputError(f"adaptive_cutoffs ({list(self.adaptive_cutoffs)}) must be strictly ascending")
        self._check_probability("dropout")

    def _check_integers(self, **minimums: int) -> None:
        for name, minimum in minimums.items():
            check_size(name, getattr(self, name), minimum)

    def _check_probability(self, name: str) -> None:
        check_number(name, getattr(self, name), minimum=0, below=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """Return the config with these fields, as from `to_dict`; keys of version 0.1 give a `FutureWarning`.

        Fields that are missing have today's defaults. To read a config that an older version saved, use
        `from_pretrained`.

        Raises:
            InputError: A key is unknown (the message names the nearest valid key), or a value is out of range.
            InputTypeError: A value has the wrong type.
        """
        fields, notes = update_section("model", fields)
        if notes:
            warnings.warn(old_names_sentence("the model config", notes), FutureWarning, stacklevel=2)
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
        refuse_unknown_keys(fields, valid=hints, owner="model config")
        # JSON has lists where the fields are tuples, which run-time checks of types refuse.
        return cls(**{name: convert(name, value, hints[name]) for name, value in fields.items()})


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Config fields that all attention models share.

    Args:
        num_heads: Number of attention heads H, a divisor of `d_model`.
        d_ff: Hidden width F of the feed-forward layers.
        attention_dropout: Dropout probability of the attention weights. null: the value of `dropout`.
    """

    num_heads: int = 4
    d_ff: int = 1024
    attention_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_heads=1, d_ff=1)
        self._check_heads("num_heads")
        if self.attention_dropout is not None:
            self._check_probability("attention_dropout")

    def _check_heads(self, name: str, *, width: str = "d_model") -> None:
        heads = getattr(self, name)
        if getattr(self, width) % heads:
            raise InputError(f"{width} ({getattr(self, width)}) must be a multiple of {name} ({heads})")

    def _check_rotary(self) -> None:
        if self.head_width % 2:
            raise InputError(
                f"rotary positions need an even head width; d_model ({self.d_model}) / num_heads ({self.num_heads}) "
                f"is {self.head_width}"
            )

    @property
    def head_width(self) -> int:
        """Width D/H of one attention head."""
        return self.d_model // self.num_heads

    @property
    def attention_dropout_probability(self) -> float:
        """Dropout probability of the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


@dataclass(frozen=True, kw_only=True)
class MemoryEncoderConfig(TransformerConfig):
    """Config fields of the Memformer's encoder and memory, shared by the models that are built on them.

    Args:
        num_special_tokens: Number of token ids after `[BOS]` that can be inputs but are never predicted.
            `data.multitask` needs three.
        num_encoder_layers: Number of layers of the encoder, which reads a segment and the memory.
        num_slots: Number of memory slots K (k in the paper). 0 removes the memory reader and the memory writer (the
            paper's ablation "without memory").
        slot_width: Width W of a memory slot. null: `d_model`, as in the paper. A fact takes a slot, wide or narrow, so
            narrow slots hold more facts in the same number of bytes. A departure from the paper.
        write_temperature: Temperature tau of the memory writer's softmax; values below 1 sharpen the weights. 1 is an
            ablation of the paper.
        write_normalizer: Function that turns the memory writer's scores into weights. softmax is the paper's. entmax15
            and sparsemax can give weights of exactly 0, so that a slot can keep its content exactly; they are a
            departure from the paper.
        write_competition: Let slots compete for tokens: in each writer head, a token of a segment is written into at
            most one slot, and a slot takes at most one token. A departure from the paper, where slots do not interact.
        write_sharing: Let several tokens share the slot that scores highest for all of them. Otherwise one of them gets
            it, and the others are matched to other slots. Sharing writes fewer slots but may mix facts of one segment.
            Needs `write_competition`.
        free_slot_bias: Initial value of a learned bias that lowers a free slot's attention to itself, so that facts are
            written to slots that hold nothing yet. 0: no bias, as in the paper.
        num_writer_heads: Number of heads of the memory writer. null: the value of `num_heads`. 1 is an ablation of the
            paper.
        exchangeable_slots: Use one learned vector as the initial state of all slots and as the state that they decay to
            by forgetting. Then the model learns one rule for all free slots, and a trained model can run with more or
            fewer slots. Needs `write_competition`, without which all slots would stay equal. A departure from the
            paper, where every slot has its own vector.
        forgetting: Add the learned forgetting vectors at every write, which pull slots back to their initial state.
            False: slots are only normalized (the paper's ablation "without forgetting").
        forgetting_when_written: Scale forgetting by the share of a slot that is overwritten, so that a slot that
            attends only to itself keeps its content forever. A departure from the paper, where every slot forgets at
            every timestep.
        forgetting_speeds: Initial lengths of the forgetting vectors, relative to the norm of a slot, for the first and
            the last slot; log-uniform in between. A larger value forgets faster. Two equal numbers give every slot the
            same speed.
        log_forgetting_speeds: Learn each forgetting vector as a direction and the logarithm of its speed, so that slow
            slots stay slow in training. A departure from the paper, which learns the vectors themselves (False).
        positions: Position scheme: "rotary", or "relative" for the simplified relative positions of the paper's first
            version.
        convolution_kernel: Kernel width of a depthwise convolution over the encoder's embedded tokens, an odd number.
            0: no convolution. It is meant to bind neighbouring tokens. A departure from the paper.
        content_addressing: Initialize the weights so that a token attends to the slot with the same content: the key
            projections of memory readers equal their query projections, the writer copies tokens unchanged, and the
            convolution adds the preceding tokens. All weights are trained from there. Without it, training finds such
            weights only by chance and late. A departure from the paper.
        position_embedding: Add a learned embedding of each token's position in its segment to the encoder's input, so
            that the writer can select tokens by position and a slot can encode the position of its content. A departure
            from the paper.

    Raises:
        InputError: A value is out of range, or two values contradict each other.
        InputTypeError: A value has the wrong type.
    """

    num_special_tokens: int = 0
    num_encoder_layers: int = 4
    num_slots: int = 32
    slot_width: int | None = None
    write_temperature: float = 0.25
    write_normalizer: Normalizer = "softmax"
    write_competition: bool = False
    write_sharing: bool = False
    free_slot_bias: float = 0.0
    num_writer_heads: int | None = None
    exchangeable_slots: bool = False
    forgetting: bool = True
    forgetting_when_written: bool = False
    forgetting_speeds: tuple[float, float] = (0.3, 1e-5)
    log_forgetting_speeds: bool = True
    positions: PositionScheme = "rotary"
    convolution_kernel: int = 0
    content_addressing: bool = False
    position_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_special_tokens=0, num_encoder_layers=1, num_slots=0, convolution_kernel=0)
        if self.num_special_tokens and self.adaptive_cutoffs:
            raise InputError(
                f"num_special_tokens ({self.num_special_tokens}) must be 0 if adaptive_cutoffs are set: "
                "their embedding has no special token except [BOS]"
            )
        if self.slot_width is not None:
            self._check_integers(slot_width=1)
            if self.num_slots == 0:
                raise InputError("slot_width is set, but num_slots is 0: there is no slot")
        if self.num_writer_heads is not None:
            self._check_integers(num_writer_heads=1)
        self._check_heads(
            "num_heads" if self.num_writer_heads is None else "num_writer_heads",
            width="d_model" if self.slot_width is None else "slot_width",
        )
        if self.positions == "rotary":
            self._check_rotary()
        if self.convolution_kernel and self.convolution_kernel % 2 == 0:
            raise InputError(f"convolution_kernel ({self.convolution_kernel}) must be odd, or 0 for none")
        if self.forgetting_when_written and not self.forgetting:
            raise InputError("forgetting_when_written is set, but forgetting is false: there is nothing to scale")
        if self.content_addressing and self.num_slots == 0:
            raise InputError("content_addressing is set, but num_slots is 0: there is no slot to find")
        if self.exchangeable_slots and not self.write_competition:
            raise InputError("exchangeable_slots is set, but write_competition is false: all slots would stay the same")
        if self.write_sharing and not self.write_competition:
            raise InputError(
                "write_sharing is set, but write_competition is false: without competition every slot attends to every "
                "token"
            )
        check_number("write_temperature", self.write_temperature, above=0)
        check_number("free_slot_bias", self.free_slot_bias, minimum=0)
        for speed in self.forgetting_speeds:
            check_number("forgetting_speeds", speed, above=0)
        if self.exchangeable_slots and len(set(self.forgetting_speeds)) > 1:
            raise InputError(
                f"forgetting_speeds ({self.forgetting_speeds}) must be two equal numbers if exchangeable_slots is "
                "set: slots that share one vector share its speed"
            )

    @property
    def memory_width(self) -> int:
        """Width W of a memory slot."""
        return self.d_model if self.slot_width is None else self.slot_width

    @classmethod
    def from_preset(cls: type[Config], name: str, **fields: Any) -> Config:
        """Return a config with the fields of a preset, overridden by `fields`.

        Args:
            name: "default"; "paper" for the paper's memory and decoder; "recall" for a memory of facts (sparse writes,
                one slot per token, forgetting only in slots that are written).
            fields: Fields of this class, which override those of the preset.

        Raises:
            InputError: The preset does not exist, or a value is out of range.
            InputTypeError: A value has the wrong type.
        """
        # A classifier has no decoder, so it lacks the fields of one.
        names = {field.name for field in dataclasses.fields(cls)}
        preset = {name: value for name, value in preset_fields(name).items() if name in names}
        return cls(**{**preset, **fields})


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(MemoryEncoderConfig):
    """Config of a Memformer (arXiv 2010.06891v2, section 3).

    The defaults are a small byte-level model. These fields also set the paper's sizes and the ablations of its Table 1.

    Args:
        num_decoder_layers: Number of layers of the decoder, which predicts the next segment.
        decoder_attention: "joint": in each layer, one attention to the previous segment and to earlier tokens of the
            segment, by the projections of self-attention, so that both compete in one softmax. A departure from the
            paper, with fewer weights and operations, and better on text. "separate": self-attention to earlier tokens
            of the segment, then cross-attention to the previous segment, as in the paper.
        decoder_start_tokens: Number of last tokens of the previous segment that the decoder reads again before it
            predicts (fewer if that segment has fewer). A departure from the paper, in which it starts from `[BOS]`: 0.
            More than 1 needs joint attention.

    Raises:
        InputError: A value is out of range, or two values contradict each other.
        InputTypeError: A value has the wrong type.
    """

    model_type: ClassVar[str] = "memformer"

    num_decoder_layers: int = 4
    decoder_attention: DecoderAttention = "joint"
    decoder_start_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(num_decoder_layers=1, decoder_start_tokens=0)
        if self.decoder_start_tokens > 1 and self.decoder_attention != "joint":
            raise InputError(
                f"decoder_start_tokens ({self.decoder_start_tokens}) must be 0 or 1 if decoder_attention is "
                f"{self.decoder_attention!r}: more tokens are read by joint attention"
            )
