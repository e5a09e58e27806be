"""Base class of the models built on the Memformer's encoder and memory (arXiv 2010.06891v2)."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.models.config import MemoryEncoderConfig
from memformer.models.encoder import Encoder
from memformer.models.hugging_face import find_saved_model
from memformer.models.recurrence import check_tokens
from memformer.models.token_model import TokenModel
from memformer.nn.attention import AttentionRecord
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.linear import is_transformed
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter
from memformer.rollout import check_mask, check_padding_outside, last_token_indices
from memformer.shapes import Hidden, Memory, Segment, SegmentPadding
from memformer.utils.checks import Integer, check_size

# Numbers of slots that a memory without its free slots may have: few, because a CPU's library prepares for each.
_SLOTS_STEP = 16

# Not typing.Self: the run-time type checker of the tests does not support it in class methods.
Model = TypeVar("Model", bound="MemoryEncoder")


class MemoryEncoder(TokenModel):
    """Model with the Memformer's encoder, memory writer and memory normalization, and any readout.

    A subclass makes `encoder` and calls `_make_memory`; the order of its modules is that of its weights.
    """

    config: MemoryEncoderConfig
    encoder: Encoder

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | Path, *, device: torch.device | str = "cpu", num_slots: Integer | None = None
    ) -> Model:
        """Return the model saved by `save_pretrained`, of this package or of transformers, in evaluation mode.

        Args:
            folder: Folder of the saved model, or its name on the Hugging Face hub, `owner/name` or
                `owner/name@revision` (see `models.hugging_face.find_model_folder`).
            device: Device to load the model to.
            num_slots: Number of memory slots to use; needs a model with `exchangeable_slots`. None: as in training.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
            InputError: `num_slots` is below 1, or would change a model without `exchangeable_slots`; the model cannot
                be downloaded; or the device is unknown or not available.
        """
        folder = find_saved_model(folder)
        config = cls._read_config(folder)
        return cls._read_weights(folder, config if num_slots is None else _with_slots(config, num_slots), device=device)

    def _make_memory(self) -> None:
        """Make the memory writer and the memory normalization, unless there are no slots."""
        config = self.config
        if not config.num_slots:
            return
        self.memory_writer = MemoryWriter(
            config.memory_width,
            token_width=config.d_model,
            num_heads=config.num_writer_heads or config.num_heads,
            temperature=config.write_temperature,
            normalizer=config.write_normalizer,
            competition=config.write_competition,
            sharing=config.write_sharing,
            free_slot_bias=config.free_slot_bias,
        )
        self.memory_normalization = MemoryNormalization(
            config.num_slots,
            width=config.memory_width,
            forgetting_speeds=config.forgetting_speeds,
            exchangeable=config.exchangeable_slots,
            forgetting=config.forgetting,
            only_when_written=config.forgetting_when_written,
            log_speeds=config.log_forgetting_speeds,
        )

    def _initialise(self) -> None:
        if self.encoder.convolution is not None and self.encoder.convolution.bias is not None:
            nn.init.zeros_(self.encoder.convolution.bias)
        super()._initialise()
        if self.config.content_addressing:
            self._address_by_content()

    def _count_residual_parts(self, name: str) -> int:
        del name
        return 3 * self.config.num_encoder_layers

    @torch.no_grad()
    def _address_by_content(self) -> None:
        nn.init.eye_(self.memory_writer.value.weight)
        projection, width = self.memory_writer.token_projection, self.config.d_model
        if projection is not None:
            # PyTorch draws no orthogonal matrix in half precision.
            orthogonal = projection.weight.to(torch.promote_types(projection.weight.dtype, torch.float32))
            projection.weight.copy_(nn.init.orthogonal_(orthogonal))
        for module in self.encoder.modules():
            if isinstance(module, MemoryReader):
                key = module.attention.query.weight
                if projection is not None:
                    # Back to the model's width, scaled so that a token's score for its own content is as in that width:
                    # a narrow slot keeps a share of the token's length, and slots of any width have the same RMS.
                    share = width / self.config.memory_width
                    key = max(share, share**0.5) * key @ projection.weight.T
                module.attention.key_value.weight[:width] = key
        if self.encoder.convolution is not None:
            # Preceding tokens only: a key that also contained its value would be written to a second slot as well.
            centre = self.config.convolution_kernel // 2
            nn.init.ones_(self.encoder.convolution.weight[..., : centre + 1])
            nn.init.zeros_(self.encoder.convolution.weight[..., centre + 1 :])

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of slots K and their width W."""
        return self.config.num_slots, self.config.memory_width

    def check_auxiliary_loss(self) -> None:
        """Check that a write penalty is possible.

        Raises:
            InputError: There are no slots, or every token is written (`write_normalizer: softmax`).
        """
        if not self.config.num_slots:
            raise InputError("num_slots is 0; a write penalty needs at least 1 memory slot")
        self.memory_writer.check_auxiliary_loss()

    @property
    def keeps_unwritten_segments(self) -> bool:
        """Whether a segment of which no slot takes a token leaves the memory exactly as it is."""
        if not self.config.num_slots:
            return False
        return self.memory_writer.is_sparse and self.memory_normalization.keeps_unwritten

    def count_unwritten(self, segments: Int64[Tensor, "B N S"], *, memory: Memory) -> Int64[Tensor, " B"]:
        """Return how many segments of each row can be left out before the first that may be written to this memory.

        All segments are encoded side by side with the same memory. Needs `keeps_unwritten_segments`.
        """
        rows, _, length = segments.shape
        embedded = self._embed(segments.reshape(-1, length))
        slot_bias = None
        if embedded.dtype == memory.dtype:  # half precision has too few digits for the bias
            memory, slot_bias = self._with_free_slots_as_one(memory)
        hidden = self.encoder(embedded, memory=memory, padding_mask=None, slot_bias=slot_bias)
        may_write = self.memory_writer.may_write(
            memory,
            hidden=hidden.reshape(rows, -1, hidden.shape[-1]),
            terminal=self.memory_normalization.forgetting_vectors(),
        )
        return (~may_write.view(segments.shape).any(dim=-1)).cumprod(dim=-1).sum(dim=-1)

    def _with_free_slots_as_one(self, memory: Memory) -> tuple[Float[Tensor, "B U W"], Float[Tensor, "B 1 1 U"] | None]:
        """Return a memory with fewer slots U and the bias with which reading it gives the same.

        Exchangeable slots that hold nothing are equal. One of them, with the logarithm of their number added to its
        score, has the weight of all.
        """
        if not self.config.exchangeable_slots:
            return memory, None
        num_slots = memory.shape[1]
        is_free = (memory == self.initial_memory(1)).all(dim=-1)
        num_used = num_slots - is_free.sum(dim=-1, keepdim=True)  # (B, 1)
        size = -(-(int(num_used.max()) + 1) // _SLOTS_STEP) * _SLOTS_STEP
        if size >= num_slots:
            return memory, None
        used_first = is_free.int().argsort(dim=-1, stable=True)[:, :size, None]
        place = torch.arange(size, device=memory.device)
        num_copies = (place < num_used) + (place == num_used) * (num_slots - num_used)
        return memory.take_along_dim(used_first, dim=1), num_copies.to(memory.dtype).log()[:, None, None]

    @property
    def _largest_token_id(self) -> int:
        return self.bos_token_id + self.config.num_special_tokens

    def compile(self, **options: Any) -> None:
        """Compile the model's parts in place with `torch.compile`, for the shapes that occur.

        The layers are compiled, and the memory writer unless its slots compete (the number of rounds depends on the
        values); in a language model the loss too. Weights are shared and may change. Dropout draws the same values as
        without compilation, so that replay can repeat it. Compiling takes some seconds when a shape first occurs, and
        needs a C++ compiler on a CPU.

        Args:
            options: Options of `torch.compile`.
        """
        options = {"dynamic": False, **options}
        if options.get("backend", "inductor") == "inductor" and "mode" not in options:
            options["options"] = {"fallback_random": True, **options.get("options", {})}
        # Modes, masks and sizes of training and evaluation: beyond the limit, PyTorch silently stops compiling.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        self._compile_parts(options)

    def _compile_parts(self, options: dict[str, Any]) -> None:
        # Layer by layer: all layers of a stack share the compiled code.
        for layer in self.encoder.layers:
            layer.compile(**options)
        if self.config.num_slots and not self.config.write_competition:
            self.memory_writer.compile(**options)
            self.memory_normalization.compile(**options)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0, the terminal state of every slot, for each row, in float32 (float64 if the model is float64)."""
        if not self.config.num_slots:
            return torch.zeros((batch_size, *self.memory_shape), dtype=self.memory_dtype, device=self.device)
        return self.memory_normalization.initial_memory(batch_size)

    def _read(
        self,
        segment: Segment,
        memory: Memory | None,
        padding_mask: SegmentPadding | None,
        attention: AttentionRecord | None,
        auxiliary: AuxiliaryLoss | None,
    ) -> tuple[Hidden, Hidden, Memory]:
        """Return the hidden states and the embedding of a segment, (B, S, D), and the next memory.

        Raises:
            InputError: As `encode` of the subclass.
        """
        check_tokens(segment, largest=self._largest_token_id, name="segment")
        check_mask(padding_mask, shape=segment.shape, name="padding_mask")
        if padding_mask is not None and not is_transformed():
            check_padding_outside(padding_mask, name="padding_mask")
        if attention is not None:
            attention.clear()
        if self.config.position_embedding and segment.shape[1] > self.segment_length:
            raise InputError(
                f"segment has {segment.shape[1]} tokens per row; with position_embedding it must have at most "
                f"{self.segment_length} (segment_length)"
            )
        memory = self._enter(memory, batch_size=segment.shape[0])
        embedded = self._embed(segment)
        hidden = self.encoder(embedded, memory=memory, padding_mask=padding_mask, record=attention)
        if not self.config.num_slots:
            if auxiliary is not None:
                self.check_auxiliary_loss()
            return hidden, embedded, memory
        updated_slots, written = self.memory_writer(
            memory,
            hidden=hidden,
            terminal=self.memory_normalization.forgetting_vectors(),
            padding_mask=padding_mask,
            record=attention,
            auxiliary=auxiliary,
        )
        if attention is not None:
            attention.left = self.memory_normalization.share_left(updated_slots, written=written).detach()
        next_memory = self.memory_normalization(updated_slots, written=written)
        if padding_mask is not None:
            next_memory = torch.where(padding_mask.all(dim=-1)[:, None, None], memory, next_memory)
        return hidden, embedded, next_memory


def last_of(
    states: Float[Tensor, "B S D"], padding_mask: Bool[Tensor, "B S"] | None, *, count: int = 1
) -> Float[Tensor, "B N D"]:
    """Return the states of the last `count` tokens of each row; those that a row lacks are finite but meaningless."""
    length = states.shape[1]
    if padding_mask is None and length >= count:
        return states[:, length - count :]
    last = (
        states.new_full((), length - 1, dtype=torch.int64) if padding_mask is None else last_token_indices(padding_mask)
    )
    index = (last[..., None] + torch.arange(1 - count, 1, device=states.device)).clamp(min=0)
    return states.gather(1, index[..., None].expand(states.shape[0], count, states.shape[2]))


def _with_slots(config: MemoryEncoderConfig, num_slots: Integer) -> MemoryEncoderConfig:
    num_slots = check_size("num_slots", num_slots, 1)
    if num_slots != config.num_slots and not config.exchangeable_slots:
        raise InputError(
            f"num_slots ({num_slots}) must be {config.num_slots}, as in training; "
            "only a model with exchangeable_slots can use another number"
        )
    return dataclasses.replace(config, num_slots=num_slots)
