"""The Memformer: encoder with memory, memory writer and decoder (arXiv 2010.06891v2)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.models.config import MemformerConfig
from memformer.models.decoder import Decoder, Past
from memformer.models.encoder import Encoder
from memformer.models.hugging_face import find_model_folder
from memformer.models.language_model import LanguageModel
from memformer.models.recurrence import check_tokens
from memformer.nn.attention import AttentionRecord, KeyValueCache
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter
from memformer.rollout import check_mask, last_token_indices
from memformer.shapes import DecoderStartIds, Hidden, Logits, Memory, Segment, SegmentPadding, Targets
from memformer.utils.checks import Integer, check_size, check_type


class Memformer(LanguageModel):
    """Model that reads segment by segment with a fixed-size memory and predicts each segment from the previous one.

    A document's first segment is predicted from the one-token segment `[BOS]`, read with the initial memory, so the
    likelihood covers every token (the paper leaves this open). Hidden states are (B, S, D); with
    `decoder_starts_from_last_token` the embedded last token is appended, (B, S + 1, D).

    Args:
        config: The model's config.
    """

    config: MemformerConfig
    config_class: ClassVar[type[MemformerConfig]] = MemformerConfig

    def __init__(self, config: MemformerConfig) -> None:
        check_type("config", config, MemformerConfig)
        super().__init__(config, num_special_tokens=config.num_special_tokens)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.num_slots:
            self.memory_writer = MemoryWriter(
                config.d_model,
                num_heads=config.num_writer_heads or config.num_heads,
                temperature=config.write_temperature,
                normalizer=config.write_normalizer,
                competition=config.write_competition,
                sharing=config.write_sharing,
                free_slot_bias=config.free_slot_bias,
            )
            self.memory_normalization = MemoryNormalization(
                config.num_slots,
                width=config.d_model,
                forgetting_speeds=config.forgetting_speeds,
                exchangeable=config.exchangeable_slots,
                forgetting=config.forgetting,
                only_when_written=config.forgetting_when_written,
                log_speeds=config.log_forgetting_speeds,
            )
        self._initialise()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", num_slots: Integer | None = None
    ) -> "Memformer":
        """Return the model saved by `save_pretrained`, of this package or of transformers, in evaluation mode.

        Args:
            folder: Folder of the saved model, or its name on the Hugging Face hub, `owner/name` or
                `owner/name@revision` (see `models.hugging_face.find_model_folder`).
            device: Device to load the model to.
            num_slots: Number of memory slots to use; needs a model with `exchangeable_slots`. None: as in training.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
            InputError: `num_slots` is below 1, or would change a model without `exchangeable_slots`; or the model
                cannot be downloaded.
        """
        folder = find_model_folder(folder)
        config = cls._read_config(folder)
        return cls._read_weights(folder, config if num_slots is None else _with_slots(config, num_slots), device=device)

    @classmethod
    def _count_layers(cls, config: MemformerConfig) -> Mapping[str, int]:
        return {"encoder.layers": config.num_encoder_layers, "decoder.layers": config.num_decoder_layers}

    def _initialise(self) -> None:
        if self.encoder.convolution is not None and self.encoder.convolution.bias is not None:
            nn.init.zeros_(self.encoder.convolution.bias)
        super()._initialise()
        if self.config.content_addressing:
            self._address_by_content()

    def _count_residual_parts(self, name: str) -> int:
        return 3 * (self.config.num_encoder_layers if "encoder" in name else self.config.num_decoder_layers)

    @torch.no_grad()
    def _address_by_content(self) -> None:
        nn.init.eye_(self.memory_writer.value.weight)
        for module in self.encoder.modules():
            if isinstance(module, MemoryReader):
                module.attention.key_value.weight[: self.config.d_model] = module.attention.query.weight
        if self.encoder.convolution is not None:
            # Preceding tokens only: a key that also contained its value would be written to a second slot as well.
            centre = self.config.convolution_kernel // 2
            nn.init.ones_(self.encoder.convolution.weight[..., : centre + 1])
            nn.init.zeros_(self.encoder.convolution.weight[..., centre + 1 :])

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Number of slots K and their width D."""
        return self.config.num_slots, self.config.d_model

    def check_auxiliary_loss(self) -> None:
        """Check that a write penalty is possible.

        Raises:
            InputError: There are no slots, or every token is written (`write_normalizer: softmax`).
        """
        if not self.config.num_slots:
            raise InputError("num_slots is 0; a write penalty needs at least 1 memory slot")
        self.memory_writer.check_auxiliary_loss()

    @property
    def _largest_token_id(self) -> int:
        return self.bos_token_id + self.config.num_special_tokens

    def compile(self, **options: Any) -> None:
        """Compile the model's parts in place with `torch.compile`, for the shapes that occur.

        The layers and the loss are compiled, and the memory writer unless its slots compete (the number of rounds
        depends on the values). Weights are shared and may change. Dropout draws the same values as without
        compilation, so that replay can repeat it. Compiling takes some seconds when a shape first occurs, and needs a
        C++ compiler on a CPU.

        Args:
            options: Options of `torch.compile`.
        """
        options = {"dynamic": False, **options}
        if options.get("backend", "inductor") == "inductor" and "mode" not in options:
            options["options"] = {"fallback_random": True, **options.get("options", {})}
        # Modes, masks and sizes of training and evaluation: beyond the limit, PyTorch silently stops compiling.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        # Layer by layer: all layers of a stack share the compiled code.
        for layer in [*self.encoder.layers, *self.decoder.layers]:
            layer.compile(**options)
        self.embedding.compile_nll(**options)
        if self.config.num_slots and not self.config.write_competition:
            self.memory_writer.compile(**options)
            self.memory_normalization.compile(**options)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0, the terminal state of every slot, for each row, in float32 (float64 if the model is float64)."""
        if not self.config.num_slots:
            return torch.zeros((batch_size, *self.memory_shape), dtype=self.memory_dtype, device=self.device)
        return self.memory_normalization.initial_memory(batch_size)

    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        attention: AttentionRecord | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return its hidden states and the next memory.

        The memory of a row that is all padding does not change; its hidden states are finite but meaningless.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`, and special tokens follow it).
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding, which may come before or after the tokens, not between. None: no padding.
            attention: Receives the attention weights of memory readers and writer, if given.
            auxiliary: Receives the write penalty (see `MemoryWriter`), if given.

        Raises:
            InputError: A token id or a shape is out of range, the memory is of another model, or `auxiliary` is
                given and the model has no slots or writes every token (`write_normalizer: softmax`).
            InputTypeError: A dtype is wrong.
        """
        check_tokens(segment, largest=self._largest_token_id, name="segment")
        check_mask(padding_mask, shape=segment.shape, name="padding_mask")
        if self.config.position_embedding and segment.shape[1] > self.segment_length:
            raise InputError(
                f"segment has {segment.shape[1]} tokens per row; with position_embedding it must have at most "
                f"{self.segment_length} (segment_length)"
            )
        memory = self._enter(memory, batch_size=segment.shape[0])
        embedded = self._embed(segment)
        hidden = self.encoder(embedded, memory=memory, padding_mask=padding_mask, record=attention)
        readable = hidden
        if self.config.decoder_starts_from_last_token:
            readable = torch.cat([hidden, _last_of(embedded, padding_mask).to(hidden.dtype)], dim=1)
        if not self.config.num_slots:
            if auxiliary is not None:
                self.check_auxiliary_loss()
            return readable, memory
        updated_slots, written = self.memory_writer(
            memory,
            hidden=hidden,
            terminal=self.memory_normalization.forgetting_vectors(),
            padding_mask=padding_mask,
            record=attention,
            auxiliary=auxiliary,
        )
        next_memory = self.memory_normalization(updated_slots, written=written)
        if padding_mask is not None:
            next_memory = torch.where(padding_mask.all(dim=-1)[:, None, None], memory, next_memory)
        return readable, next_memory

    def _features(
        self,
        targets: Targets,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None,
        decoder_start_ids: DecoderStartIds | None,
    ) -> Float[Tensor, "B T D"]:
        check_tokens(targets, largest=self.vocab_size - 1, name="targets")
        if decoder_start_ids is None:
            decoder_start_ids = targets.new_full(targets.shape[:1], self.bos_token_id)
        else:
            check_tokens(decoder_start_ids[:, None], largest=self._largest_token_id, name="decoder_start_ids")
        self._check_hidden(hidden, batch_size=targets.shape[0])
        read = torch.Size((hidden.shape[0], hidden.shape[1] - self.config.decoder_starts_from_last_token))
        check_mask(hidden_padding_mask, shape=read, name="hidden_padding_mask")
        past = self.decoder.precompute_cross_attention(hidden, padding_mask=hidden_padding_mask)
        x = self._embed_for_decoder(torch.cat([decoder_start_ids[:, None], targets[:, :-1]], dim=1), past)
        features: Tensor = self.decoder(x, past=past)
        return features

    def _embed_for_decoder(self, tokens: Tensor, past: Past) -> Tensor:
        x = self._embed(tokens)
        if past.start is None:
            return x
        return torch.where((tokens == self.bos_token_id)[..., None], past.start[:, None], x)

    def precompute_cross_attention(self, hidden: Hidden, *, hidden_padding_mask: SegmentPadding | None = None) -> Past:
        """Return the cross-attention inputs of `decode_step`, projected once for a whole segment."""
        return self.decoder.precompute_cross_attention(hidden, padding_mask=hidden_padding_mask)

    def decode_step(
        self,
        tokens: Segment,
        *,
        past: Past,
        caches: list[KeyValueCache],
        positions: Segment,
        num_cached: int | None = None,
    ) -> Logits:
        """Return the next-token logits after each token: an incremental `decode`.

        Args:
            tokens: The next decoder inputs, 0 .. V; the first input of a segment is `[BOS]`.
            past: Result of `precompute_cross_attention`.
            caches: Result of `make_caches`; keys and values of the tokens are added to them.
            positions: Position of each token in its segment; `segment_length` marks padding.
            num_cached: Number of tokens decoded before, if it is the same in all rows and there is no padding; given,
                the step is faster.
        """
        x = self._embed_for_decoder(tokens, past)
        features = self.decoder.step(x, past=past, caches=caches, positions=positions, num_cached=num_cached)
        return self.embedding.logits(features)

    def make_caches(self, batch_size: int) -> list[KeyValueCache]:
        """Return an empty key-value cache of one segment for each decoder layer."""
        return [
            KeyValueCache(
                batch_size=batch_size,
                num_heads=self.config.num_heads,
                length=self.segment_length,
                head_width=self.config.head_width,
                like=next(self.parameters()).detach(),
            )
            for _ in range(self.config.num_decoder_layers)
        ]


def _last_of(embedded: Float[Tensor, "B S D"], padding_mask: Bool[Tensor, "B S"] | None) -> Float[Tensor, "B 1 D"]:
    """Return the last token of each row, or the first position of a row without tokens."""
    if padding_mask is None:
        return embedded[:, -1:]
    last = last_token_indices(padding_mask)[:, None, None]
    return embedded.gather(1, last.expand(-1, 1, embedded.shape[2]))


def _with_slots(config: MemformerConfig, num_slots: Integer) -> MemformerConfig:
    num_slots = check_size("num_slots", num_slots, 1)
    if num_slots != config.num_slots and not config.exchangeable_slots:
        raise InputError(
            f"num_slots ({num_slots}) must be {config.num_slots}, as in training; "
            "only a model with exchangeable_slots can use another number"
        )
    return dataclasses.replace(config, num_slots=num_slots)
