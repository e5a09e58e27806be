"""The Memformer: encoder with memory, memory writer, decoder (arXiv 2010.06891v2)."""

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
from memformer.models.language_model import LanguageModel
from memformer.models.recurrence import check_tokens
from memformer.nn.attention import AttentionRecord, KeyValueCache
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter, WritePressure
from memformer.rollout import check_mask, last_places
from memformer.shapes import Hidden, Logits, Memory, Segment, SegmentPadding, Starts, Targets


class Memformer(LanguageModel):
    """Reads a sequence segment by segment with a memory of fixed size; predicts each segment from the one before.

    A document's first segment is predicted from the one-token segment `[BOS]`, read with the initial memory, so the
    likelihood covers every token (the paper leaves this open). Hidden states are (B, S, D); with
    `decoder_reads_memory` the K written slots follow them, (B, S + K, D), and with `decoder_starts_from_last_token` the
    embedded last token.

    Args:
        config: What to build.
    """

    config: MemformerConfig
    config_class: ClassVar[type[MemformerConfig]] = MemformerConfig

    def __init__(self, config: MemformerConfig) -> None:
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
                free_slot_eagerness=config.free_slot_eagerness,
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
        cls, folder: str | Path, *, device: torch.device | str = "cpu", num_slots: int | None = None
    ) -> "Memformer":
        """Return the model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: Where it was saved.
            device: Where it goes.
            num_slots: Memory slots to run with, in place of those trained with; for a model of `exchangeable_slots`.

        Raises:
            CheckpointError: A file is missing, damaged, or of another model.
            InputError: `num_slots` is given for a model whose slots each have a vector of their own, or is below 1.
        """
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
            # Tokens before, not after: a key that knew its value too would be written beside it, in a second slot.
            centre = self.config.convolution_kernel // 2
            nn.init.ones_(self.encoder.convolution.weight[..., : centre + 1])
            nn.init.zeros_(self.encoder.convolution.weight[..., centre + 1 :])

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Slots K and width D."""
        return self.config.num_slots, self.config.d_model

    @property
    def _largest_token_id(self) -> int:
        return self.bos_token_id + self.config.num_special_tokens

    def compile(self, **options: Any) -> None:
        """Compile encoder and decoder in place, by `torch.compile` for the shapes that occur; writing stays as it is.

        Weights may change and are shared; dropout draws what it would draw uncompiled, so that replay can draw it
        again. Compiling takes some seconds when a shape first occurs, and needs a C++ compiler on a CPU.

        Args:
            options: Of `torch.compile`.
        """
        options = {"dynamic": False, **options}
        if options.get("backend", "inductor") == "inductor" and "mode" not in options:
            options["options"] = {"fallback_random": True, **options.get("options", {})}
        self.encoder.compile(**options)
        self.decoder.compile(**options)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return M_0 for each row, every slot in its terminal state; float32 (float64 if the model is)."""
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
        pressure: WritePressure | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return its hidden states and the memory that leaves it.

        A row that is all padding leaves its memory as it was; its hidden states are finite and mean nothing.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`, and special tokens follow it).
            memory: The memory that enters; None for the initial memory.
            padding_mask: True at padding, which may stand before or after the tokens, not between; None for none.
            attention: Filled with the attention weights of memory readers and writer, if given.
            pressure: Filled with how much the tokens press to be written, if given.

        Raises:
            InputError: A token id or a shape is out of range, the memory is another model's, or `pressure` is given
                and the model has no slots or writes every token (`write_normalizer: softmax`).
            InputTypeError: A dtype is wrong.
        """
        check_tokens(segment, largest=self._largest_token_id, name="segment")
        check_mask(padding_mask, shape=segment.shape, name="padding_mask")
        if self.config.place_embedding and segment.shape[1] > self.segment_length:
            raise InputError(
                f"segment has {segment.shape[1]} tokens a row; place_embedding knows {self.segment_length} places"
            )
        memory = self._enter(memory, batch_size=segment.shape[0])
        embedded = self._embed(segment)
        hidden = self.encoder(embedded, memory=memory, padding_mask=padding_mask, record=attention)
        followers = [_last_of(embedded, padding_mask)] if self.config.decoder_starts_from_last_token else []
        if not self.config.num_slots:
            if pressure is not None:
                raise InputError("num_slots is 0: a price on writing needs a memory to write to")
            return _followed_by(hidden, followers), memory
        looked, written = self.memory_writer(
            memory,
            hidden=hidden,
            terminal=self.memory_normalization.forgetting_vectors(),
            padding_mask=padding_mask,
            record=attention,
            pressure=pressure,
        )
        next_memory = self.memory_normalization(looked, written=written)
        if padding_mask is not None:
            next_memory = torch.where(padding_mask.all(dim=-1)[:, None, None], memory, next_memory)
        if self.config.decoder_reads_memory:
            followers.insert(0, next_memory)
        return _followed_by(hidden, followers), next_memory

    def encode_with_auxiliary_loss(
        self, segment: Segment, *, memory: Memory, padding_mask: SegmentPadding | None = None
    ) -> tuple[Hidden, Memory, Float[Tensor, ""]]:
        """Read one segment as `encode` does; return also the pressure of its tokens to be written, for its price.

        Raises:
            InputError: As `encode` does, where it is given a `pressure`.
        """
        pressure = WritePressure()
        hidden, next_memory = self.encode(segment, memory=memory, padding_mask=padding_mask, pressure=pressure)
        assert pressure.total is not None
        return hidden, next_memory, pressure.total

    def _features(
        self, targets: Targets, hidden: Hidden, hidden_padding_mask: SegmentPadding | None, starts: Starts | None
    ) -> Float[Tensor, "B T D"]:
        check_tokens(targets, largest=self.vocab_size - 1, name="targets")
        if starts is None:
            starts = targets.new_full(targets.shape[:1], self.bos_token_id)
        else:
            check_tokens(starts[:, None], largest=self._largest_token_id, name="starts")
        self._check_hidden(hidden, batch_size=targets.shape[0])
        num_followers = self.decoder.num_slots_read + self.config.decoder_starts_from_last_token
        read = torch.Size((hidden.shape[0], hidden.shape[1] - num_followers))
        check_mask(hidden_padding_mask, shape=read, name="hidden_padding_mask")
        past = self.decoder.look_back(hidden, padding_mask=hidden_padding_mask)
        x = self._embed_for_decoder(torch.cat([starts[:, None], targets[:, :-1]], dim=1), past)
        features: Tensor = self.decoder(x, past=past)
        return features

    def _embed_for_decoder(self, tokens: Tensor, past: Past) -> Tensor:
        x = self._embed(tokens)
        if past.start is None:
            return x
        return torch.where((tokens == self.bos_token_id)[..., None], past.start[:, None], x)

    def look_back(self, hidden: Hidden, *, hidden_padding_mask: SegmentPadding | None = None) -> Past:
        """Return what `decode_step` looks back at, projected once for a whole segment."""
        return self.decoder.look_back(hidden, padding_mask=hidden_padding_mask)

    def decode_step(
        self,
        tokens: Segment,
        *,
        past: Past,
        caches: list[KeyValueCache],
        positions: Segment,
        num_cached: int | None = None,
    ) -> Logits:
        """Return the logits of what follows each token; `decode` a few tokens at a time.

        Args:
            tokens: The next decoder inputs, `[BOS]` first; 0 .. V.
            past: From `look_back`.
            caches: From `make_caches`; the tokens' keys and values are added.
            positions: Place of each token in its segment; `segment_length` marks padding.
            num_cached: Tokens decoded before, where they are as many in all rows and there is no padding; saves time.
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
                like=self.encoder.norm.weight.detach(),
            )
            for _ in range(self.config.num_decoder_layers)
        ]


def _followed_by(hidden: Tensor, followers: list[Tensor]) -> Tensor:
    return torch.cat([hidden, *(each.to(hidden.dtype) for each in followers)], dim=1) if followers else hidden


def _last_of(embedded: Float[Tensor, "B S D"], padding_mask: Bool[Tensor, "B S"] | None) -> Float[Tensor, "B 1 D"]:
    """Return the last token of each row; its first place where it has none."""
    if padding_mask is None:
        return embedded[:, -1:]
    last = last_places(padding_mask)[:, None, None]
    return embedded.gather(1, last.expand(-1, 1, embedded.shape[2]))


def _with_slots(config: MemformerConfig, num_slots: int) -> MemformerConfig:
    if num_slots < 1:
        raise InputError(f"num_slots ({num_slots}) must be at least 1")
    if num_slots != config.num_slots and not config.exchangeable_slots:
        raise InputError(
            f"num_slots ({num_slots}) must be {config.num_slots}, as trained: only slots that share one vector "
            "(exchangeable_slots) can be more or fewer"
        )
    return dataclasses.replace(config, num_slots=num_slots)
