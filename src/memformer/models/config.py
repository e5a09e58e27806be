"""The shape of a model; checked when it is made, stored as JSON beside the weights. What all models have; Memformer."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from memformer.errors import InputError, InputTypeError
from memformer.nn.entmax import Normalizer
from memformer.utils.checks import check_integer, check_number, refuse_unknown_keys

PositionScheme = Literal["rotary", "relative"]
# Not typing.Self: the run-time checks of the tests do not know it in a class method.
Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the config of every model has.

    Args:
        vocab_size: Number of token ids V; tokens are 0 .. V-1, and V itself is the built-in `[BOS]`.
        adaptive_cutoffs: For large vocabularies sorted by frequency: ids at which clusters of rarer words begin. Their
            embeddings are narrower, a quarter for each cluster, and the softmax takes two steps. Empty for one softmax
            over all tokens. A departure from the paper, which does not say.
        d_model: Width D of tokens and memory slots.
        segment_length: Tokens per segment (paper: L).
        dropout: Probability of dropping, after every sub-layer; other dropouts follow it where they are null.
        embedding_dropout: Probability of dropping an embedded feature; null means `dropout`.

    Raises:
        InputError: A value is out of its range, or two contradict each other.
        InputTypeError: A value has the wrong type.
    """

    model_type: ClassVar[str]

    vocab_size: int = 256
    adaptive_cutoffs: tuple[int, ...] = ()
    d_model: int = 256
    segment_length: int = 128
    dropout: float = 0.0
    embedding_dropout: float | None = None

    def __post_init__(self) -> None:
        self._check_integers(vocab_size=2, d_model=1, segment_length=1)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise InputTypeError(f"{field.name} ({value!r}) must be true or false")
        for cutoff in self.adaptive_cutoffs:
            check_integer("adaptive_cutoffs", cutoff, 1)
        if list(self.adaptive_cutoffs) != sorted(set(self.adaptive_cutoffs)):
            raise InputError(f"adaptive_cutoffs ({list(self.adaptive_cutoffs)}) must ascend")
        self._check_probability("dropout")
        if self.embedding_dropout is not None:
            self._check_probability("embedding_dropout")

    def _check_integers(self, **minimums: int) -> None:
        for name, minimum in minimums.items():
            check_integer(name, getattr(self, name), minimum)

    def _check_probability(self, name: str) -> None:
        probability = getattr(self, name)
        check_number(name, probability)
        if not 0 <= probability < 1:
            raise InputError(f"{name} ({probability}) must be at least 0 and below 1")

    @property
    def embedding_dropout_probability(self) -> float:
        """Probability of dropping an embedded feature."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """Return the config that `to_dict` described.

        Raises:
            InputError: A key is unknown (the nearest valid one is named), or a value is out of its range.
            InputTypeError: A value has the wrong type.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        refuse_unknown_keys(fields, valid=known, owner="model config")
        fields = dict(fields)
        for name, value in fields.items():
            if isinstance(known[name].default, tuple):
                if not isinstance(value, list | tuple):
                    raise InputTypeError(f"{name} ({value!r}) must be a list of numbers")
                fields[name] = tuple(value)
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """What the config of every model made of attention has, beside what every model's has.

    Args:
        num_heads: Attention heads H; they split the width.
        d_ff: Width F inside the feed-forward layers.
        attention_dropout: Probability of dropping an attention weight; null means `dropout`.
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

    def _check_heads(self, name: str) -> None:
        heads = getattr(self, name)
        if self.d_model % heads:
            raise InputError(f"d_model ({self.d_model}) must be a multiple of {name} ({heads})")

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
        """Probability of dropping an attention weight."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(TransformerConfig):
    """Everything that decides what a Memformer computes (arXiv 2010.06891v2, section 3).

    The defaults are a small byte-level model; the paper's own sizes and the ablations of its Table 1 are configs.

    Args:
        num_special_tokens: Token ids after `[BOS]` that can be read, never predicted; `data.multitask` needs three.
        num_encoder_layers: Layers that read a segment and the memory.
        num_decoder_layers: Layers that predict the next segment.
        num_slots: Memory slots K (paper: k). 0 is the ablation "without memory": no reader and no writer.
        write_temperature: Temperature tau of the memory writer's softmax; below 1 sharpens. 1 is an ablation.
        write_normalizer: What turns the writer's scores into weights: softmax (the paper), or entmax15 or sparsemax,
            whose weights can be exactly 0, so that a slot can keep its content exactly. A departure from the paper.
        write_competition: Let slots compete for tokens: each token is written into one slot, and each slot takes one
            token of a segment. A departure from the paper, where slots never see each other.
        write_sharing: Let tokens that want the same slot most share it, in place of giving it to one and letting the
            others choose again. Fewer slots are written, but facts told in one segment may be mixed.
        free_slot_eagerness: How much lower a free slot scores itself at the start of training, so that facts go where
            nothing is written yet; learned. 0 leaves it out, as the paper does.
        num_writer_heads: Heads of the memory writer; null means `num_heads`. 1 is an ablation.
        exchangeable_slots: Let all slots start from, and forget towards, one learned vector. What one free slot learns
            then holds for all, and a trained model may be run with more or fewer slots. Needs `write_competition`,
            which alone makes slots differ. A departure from the paper, where every slot has a vector of its own.
        forgetting: Add the learned forgetting vectors at every write. False is the ablation "without forgetting":
            slots stay on their sphere, nothing pulls them back to their initial state.
        forgetting_when_written: Forget only in the measure that a slot is written: one that looks only at itself keeps
            its content for ever. A departure from the paper, where every slot forgets at every timestep.
        forgetting_speeds: ||v_i|| relative to the sphere's radius at the start of training, for the first and the last
            slot; log-uniform between. Two equal numbers give every slot the same speed.
        log_forgetting_speeds: Learn the speeds as logarithms beside the vectors' directions, so that slow slots stay
            slow in training. A departure from the paper, which learns the vectors (False).
        positions: "rotary", or "relative" for the simplified relative positions of the paper's first version.
        decoder_reads_memory: Let the decoder attend to the written slots too. A departure from the paper, after
            its authors' later code; off by default.
        decoder_starts_from_last_token: Let the decoder start from the last token that was read in place of `[BOS]`:
            else the first targets of a segment see the token before them by cross-attention alone, which costs most
            where segments are short. It helped after little training and not after more. A departure from the paper.
        convolution_kernel: Width of a depthwise convolution on the encoder's embedded tokens; odd, 0 for none.
            A departure from the paper, for binding neighbouring tokens.
        content_addressing: Start from weights with which a token finds the slot that holds what it holds: readers' keys
            equal their queries, the writer copies what it writes, and the convolution adds the tokens before. All of it
            is learned on from there. A departure from the paper, for binding: else that starts by chance, late.
        place_embedding: Add a learned embedding of a token's place in its segment to what the encoder reads, so that
            the writer can choose by place and a slot can tell where its content stood. A departure from the paper.

    Raises:
        InputError: A value is out of its range, or two contradict each other.
        InputTypeError: A value has the wrong type.
    """

    model_type: ClassVar[str] = "memformer"

    num_special_tokens: int = 0
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_slots: int = 32
    write_temperature: float = 0.25
    write_normalizer: Normalizer = "softmax"
    write_competition: bool = False
    write_sharing: bool = False
    free_slot_eagerness: float = 0.0
    num_writer_heads: int | None = None
    exchangeable_slots: bool = False
    forgetting: bool = True
    forgetting_when_written: bool = False
    forgetting_speeds: tuple[float, float] = (0.3, 1e-5)
    log_forgetting_speeds: bool = True
    positions: PositionScheme = "rotary"
    decoder_reads_memory: bool = False
    decoder_starts_from_last_token: bool = False
    convolution_kernel: int = 0
    content_addressing: bool = False
    place_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers(
            num_special_tokens=0, num_encoder_layers=1, num_decoder_layers=1, num_slots=0, convolution_kernel=0
        )
        if self.num_special_tokens and self.adaptive_cutoffs:
            raise InputError("num_special_tokens is set, but embeddings with adaptive_cutoffs know [BOS] alone")
        if self.num_writer_heads is not None:
            self._check_integers(num_writer_heads=1)
            self._check_heads("num_writer_heads")
        if self.positions not in get_args(PositionScheme):
            raise InputError(f"positions ({self.positions!r}) must be one of {', '.join(get_args(PositionScheme))}")
        if self.write_normalizer not in get_args(Normalizer):
            raise InputError(
                f"write_normalizer ({self.write_normalizer!r}) must be one of {', '.join(get_args(Normalizer))}"
            )
        if self.positions == "rotary":
            self._check_rotary()
        if self.convolution_kernel and self.convolution_kernel % 2 == 0:
            raise InputError(f"convolution_kernel ({self.convolution_kernel}) must be odd, or 0 for none")
        if self.decoder_reads_memory and self.num_slots == 0:
            raise InputError("decoder_reads_memory is set, but num_slots is 0: there is no memory to read")
        if self.forgetting_when_written and not self.forgetting:
            raise InputError("forgetting_when_written is set, but forgetting is false: there is nothing to scale")
        if self.content_addressing and self.num_slots == 0:
            raise InputError("content_addressing is set, but num_slots is 0: there is no slot to find")
        if self.exchangeable_slots and not self.write_competition:
            raise InputError("exchangeable_slots is set, but write_competition is false: all slots would stay the same")
        if self.write_sharing and not self.write_competition:
            raise InputError(
                "write_sharing is set, but write_competition is false: all slots share all tokens as it is"
            )
        check_number("write_temperature", self.write_temperature)
        if not 0 < self.write_temperature < float("inf"):
            raise InputError(f"write_temperature ({self.write_temperature}) must be above 0 and finite")
        check_number("free_slot_eagerness", self.free_slot_eagerness)
        if not 0 <= self.free_slot_eagerness < float("inf"):
            raise InputError(f"free_slot_eagerness ({self.free_slot_eagerness}) must be at least 0 and finite")
        if len(self.forgetting_speeds) != 2:
            raise InputError(f"forgetting_speeds ({self.forgetting_speeds}) must be two numbers: first and last slot")
        for speed in self.forgetting_speeds:
            check_number("forgetting_speeds", speed)
            if not 0 < speed < float("inf"):
                raise InputError(f"forgetting_speeds ({self.forgetting_speeds}) must be above 0 and finite")
        if self.exchangeable_slots and len(set(self.forgetting_speeds)) > 1:
            raise InputError(
                f"forgetting_speeds ({self.forgetting_speeds}) must be two equal numbers where exchangeable_slots is "
                "set: slots that share one vector share its speed"
            )
