"""The Memformer: encoder with memory, memory writer and decoder (arXiv 2010.06891v2)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from memformer.errors import InputError
from memformer.models.config import MemformerConfig
from memformer.models.decoder import Decoder, Past
from memformer.models.encoder import Encoder
from memformer.models.language_model import LanguageModel
from memformer.models.memory_encoder import MemoryEncoder, last_of
from memformer.models.recurrence import check_tokens
from memformer.nn.attention import AttentionRecord, KeyValueCache
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.rollout import Rollout, check_mask, check_targets_have_inputs
from memformer.shapes import DecoderStartIds, Hidden, Logits, Memory, Segment, SegmentPadding, Targets
from memformer.utils.checks import check_type


class Memformer(MemoryEncoder, LanguageModel):
    """Model that reads segment by segment with a fixed-size memory and predicts each segment from the previous one.

    A document's first segment is predicted from the one-token segment `[BOS]`, read with the initial memory, so the
    likelihood covers every token (the paper leaves this open). Hidden states are (B, S + N, D): one for each token, and
    the last N embedded tokens (`decoder_start_tokens`), which the decoder reads again before it predicts.

    Args:
        config: The model's config.
    """

    config: MemformerConfig
    config_class: ClassVar[type[MemformerConfig]] = MemformerConfig

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._make_memory()
        self._initialise()

    @classmethod
    def _count_layers(cls, config: MemformerConfig) -> Mapping[str, int]:
        return {"encoder.layers": config.num_encoder_layers, "decoder.layers": config.num_decoder_layers}

    def _count_residual_parts(self, name: str) -> int:
        if "encoder" in name:
            return 3 * self.config.num_encoder_layers
        return (2 if self.config.decoder_attention == "joint" else 3) * self.config.num_decoder_layers

    def _compile_parts(self, options: dict[str, Any]) -> None:
        super()._compile_parts(options)
        for layer in self.decoder.layers:
            layer.compile(**options)
        self.embedding.compile_nll(**options)

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
        hidden, embedded, next_memory = self._read(segment, memory, padding_mask, attention, auxiliary)
        if count := self.config.decoder_start_tokens:
            hidden = torch.cat([hidden, last_of(embedded, padding_mask, count=count).to(hidden.dtype)], dim=1)
        return hidden, next_memory

    def align_inputs(self, rollout: Rollout) -> Rollout:
        """Return the rollout itself, after checking its tokens.

        Raises:
            InputError: An input, a target or a start id is not a token id, or a timestep without input tokens has
                targets (checked on a CPU only).
        """
        check_tokens(rollout.inputs.flatten(0, 1), largest=self._largest_token_id, name="inputs")
        check_tokens(rollout.targets.flatten(0, 1), largest=self.vocab_size - 1, name="targets")
        if rollout.decoder_start_ids is not None:
            check_tokens(rollout.decoder_start_ids, largest=self._largest_token_id, name="decoder_start_ids")
        check_targets_have_inputs(rollout, target="targets")
        return rollout

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
            check_type("decoder_start_ids", decoder_start_ids, Tensor)
            if decoder_start_ids.shape != targets.shape[:1]:
                raise InputError(
                    f"decoder_start_ids have shape {tuple(decoder_start_ids.shape)}; "
                    f"it must be {tuple(targets.shape[:1])}, one for each row of targets"
                )
            check_tokens(decoder_start_ids[:, None], largest=self._largest_token_id, name="decoder_start_ids")
        self._check_hidden(hidden, batch_size=targets.shape[0])
        num_start_tokens = self.config.decoder_start_tokens
        if hidden.shape[1] <= num_start_tokens:
            raise InputError(
                f"hidden has {hidden.shape[1]} states per row; encode returns {num_start_tokens} "
                "(decoder_start_tokens) more than the segment has tokens"
            )
        read = torch.Size((hidden.shape[0], hidden.shape[1] - num_start_tokens))
        check_mask(hidden_padding_mask, shape=read, name="hidden_padding_mask")
        past = self.decoder.precompute_past(hidden, padding_mask=hidden_padding_mask)
        x = self._embed_for_decoder(torch.cat([decoder_start_ids[:, None], targets[:, :-1]], dim=1), past)
        features: Tensor = self.decoder(x, past=past)
        return features

    def _embed_for_decoder(self, tokens: Tensor, past: Past) -> Tensor:
        x = self._embed(tokens)
        if past.start is None:
            return x
        return torch.where((tokens == self.bos_token_id)[..., None], past.start[:, None], x)

    def precompute_past(self, hidden: Hidden, *, hidden_padding_mask: SegmentPadding | None = None) -> Past:
        """Return the previous segment's keys and values, and the start, for `decode_step`, once per segment."""
        return self.decoder.precompute_past(hidden, padding_mask=hidden_padding_mask)

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
            tokens: The next decoder inputs, 0 .. V; the first input of a segment is `[BOS]`, in whose place the decoder
                may start from the last token of the segment before.
            past: Result of `precompute_past`.
            caches: Result of `make_caches`; keys and values of the tokens are added to them.
            positions: Position of each token in its segment; `segment_length` marks padding.
            num_cached: Number of tokens decoded before, if it is the same in all rows and there is no padding; given,
                the step is faster.
        """
        x = self._embed_for_decoder(tokens, past)
        features: Tensor = self.decoder(x, past=past, caches=caches, positions=positions, num_cached=num_cached)
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
