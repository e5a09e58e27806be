"""The Memformer: encoder with memory, memory writer, decoder (arXiv 2010.06891v2)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer.config import MemformerConfig
from memformer.errors import InputError
from memformer.models.decoder import Decoder, Past
from memformer.models.encoder import Encoder
from memformer.models.pretrained import Pretrained
from memformer.models.recurrence import RecurrentModel, check_tokens
from memformer.nn.attention import AttentionRecord, KeyValueCache
from memformer.nn.memory import MemoryNormalization, MemoryReader, MemoryWriter, WritePressure
from memformer.nn.vocabulary import AdaptiveEmbedding, TiedEmbedding
from memformer.shapes import Hidden, Logits, Memory, Segment, SegmentPadding, TargetPadding, Targets


class Memformer(Pretrained, RecurrentModel):
    """Reads a sequence segment by segment with a memory of fixed size; predicts each segment from the one before.

    A document's first segment is predicted from the one-token segment `[BOS]`, read with the initial memory, so the
    likelihood covers every token (the paper leaves this open). Hidden states are (B, S, D); with
    `decoder_reads_memory` the K written slots follow them, (B, S + K, D).

    Args:
        config: What to build.
    """

    config: MemformerConfig

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__(config)
        self.embedding = (
            AdaptiveEmbedding(config.vocab_size, config.d_model, cutoffs=config.adaptive_cutoffs)
            if config.adaptive_cutoffs
            else TiedEmbedding(config.vocab_size, config.d_model)
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_probability)
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

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith("output"):
                    # Each stack's residual stream is a sum over its layers' parts; keep its variance near one.
                    depth = self.config.num_encoder_layers if "encoder" in name else self.config.num_decoder_layers
                    std /= math.sqrt(3 * depth)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embedding.reset_parameters()
        if self.config.content_addressing:
            self._address_by_content()

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
    def vocab_size(self) -> int:
        """Number of token ids V that can be targets."""
        return self.config.vocab_size

    @property
    def bos_token_id(self) -> int:
        """The id V, which stands alone in the segment before the first."""
        return self.config.vocab_size

    @property
    def segment_length(self) -> int:
        """Tokens of a full segment."""
        return self.config.segment_length

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Slots K and width D."""
        return self.config.num_slots, self.config.d_model

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
        memory: Memory,
        padding_mask: SegmentPadding | None = None,
        attention: AttentionRecord | None = None,
        pressure: WritePressure | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return its hidden states and the memory that leaves it.

        A row that is all padding leaves its memory as it was; its hidden states are finite and mean nothing.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The memory that enters.
            padding_mask: True at padding, which may stand before or after the tokens, not between; None for none.
            attention: Filled with the attention weights of memory readers and writer, if given.
            pressure: Filled with how much the tokens press to be written, if given.

        Raises:
            InputError: A token id or a shape is out of range, the memory is another model's, or `pressure` is given
                and the model has no slots or writes every token (`write_normalizer: softmax`).
            InputTypeError: A dtype is wrong.
        """
        check_tokens(segment, largest=self.bos_token_id, name="segment")
        self.check_memory(memory, batch_size=segment.shape[0])
        hidden = self.encoder(self._embed(segment), memory=memory, padding_mask=padding_mask, record=attention)
        if not self.config.num_slots:
            if pressure is not None:
                raise InputError("num_slots is 0: a price on writing needs a memory to write to")
            return hidden, memory
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
            hidden = torch.cat([hidden, next_memory.to(hidden.dtype)], dim=1)
        return hidden, next_memory

    def decode(self, targets: Targets, *, hidden: Hidden, hidden_padding_mask: SegmentPadding | None = None) -> Logits:
        """Return the logits of each target given those before it (shifted inside) and the past.

        Args:
            targets: Token ids, 0 .. V-1. Padding may only follow the tokens; any valid id will do there.
            hidden: From `encode`.
            hidden_padding_mask: The padding mask that `encode` was given.

        Raises:
            InputError: A token id or a shape is out of range.
            InputTypeError: A dtype is wrong.
        """
        return self.embedding.logits(self._features(targets, hidden, hidden_padding_mask))

    def token_nats(
        self,
        targets: Targets,
        *,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None = None,
        target_padding_mask: TargetPadding | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the negative log-likelihood of each target in nats, in float32 or better; 0 at padding."""
        nats = self.embedding.nats(self._features(targets, hidden, hidden_padding_mask), targets)
        return nats if target_padding_mask is None else nats.masked_fill(target_padding_mask, 0.0)

    def _features(
        self, targets: Targets, hidden: Hidden, hidden_padding_mask: SegmentPadding | None
    ) -> Float[Tensor, "B T D"]:
        """Return what each target is predicted from."""
        check_tokens(targets, largest=self.vocab_size - 1, name="targets")
        bos = targets.new_full((targets.shape[0], 1), self.bos_token_id)
        past = self.decoder.look_back(hidden, padding_mask=hidden_padding_mask)
        features: Tensor = self.decoder(self._embed(torch.cat([bos, targets[:, :-1]], dim=1)), past=past)
        return features

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
        x = self._embed(tokens)
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

    def _embed(self, tokens: Segment) -> Hidden:
        # sqrt(D) gives the residual stream a variance near one while the shared output projection starts small.
        return self.embedding_dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))
