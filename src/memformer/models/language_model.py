"""Base class of all models: token embedding, output projection and weight initialization."""

import math
from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.models.pretrained import Pretrained
from memformer.models.recurrence import RecurrentModel
from memformer.nn.vocabulary import AdaptiveEmbedding, TiedEmbedding
from memformer.rollout import check_mask
from memformer.shapes import DecoderStartIds, Hidden, Logits, Segment, SegmentPadding, TargetPadding, Targets
from memformer.utils.checks import check_type


class LanguageModel(Pretrained, RecurrentModel):
    """Recurrent model over tokens, with the output projection tied to the embedding.

    Args:
        config: The model's config.
        num_special_tokens: Number of token ids after `[BOS]` that can be inputs.
    """

    def __init__(self, config: Any, *, num_special_tokens: int = 0) -> None:
        super().__init__(config)
        self.embedding = (
            AdaptiveEmbedding(config.vocab_size, config.d_model, cutoffs=config.adaptive_cutoffs)
            if config.adaptive_cutoffs
            else TiedEmbedding(config.vocab_size, config.d_model, num_special_tokens=num_special_tokens)
        )
        self.embedding_dropout = nn.Dropout(config.dropout)

    @property
    def vocab_size(self) -> int:
        """Number of token ids V that can be targets."""
        return self.config.vocab_size

    @property
    def bos_token_id(self) -> int:
        """Token id V, which precedes the first token of a document."""
        return self.config.vocab_size

    @property
    def segment_length(self) -> int:
        """Number of tokens of a full segment."""
        return self.config.segment_length

    def decode(self, targets: Targets, *, hidden: Hidden, hidden_padding_mask: SegmentPadding | None = None) -> Logits:
        """Return the logits of each target, given earlier targets (shifted internally) and the past.

        Args:
            targets: Token ids, 0 .. V-1. Padding may only follow the tokens and can be any valid id.
            hidden: Hidden states from `encode`.
            hidden_padding_mask: Padding mask that was passed to `encode`.

        Raises:
            InputError: A token id or a shape is out of range.
            InputTypeError: A dtype is wrong.
        """
        return self.embedding.logits(self._features(targets, hidden, hidden_padding_mask, None))

    def token_nll(
        self,
        targets: Targets,
        *,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None = None,
        target_padding_mask: TargetPadding | None = None,
        decoder_start_ids: DecoderStartIds | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the negative log-likelihood of each target in nats, in at least float32; 0 at padding.

        Args:
            targets: Token ids, 0 .. V-1.
            hidden: Hidden states from `encode`.
            hidden_padding_mask: Padding mask that was passed to `encode`.
            target_padding_mask: True at targets that are not counted.
            decoder_start_ids: Token ids that a Memformer's decoder starts from instead of `[BOS]`.

        Raises:
            InputError: `decoder_start_ids` are given and this model has no decoder, or a token id or a shape is out of
                range.
            InputTypeError: A dtype is wrong.
        """
        nll = self.embedding.nll(self._features(targets, hidden, hidden_padding_mask, decoder_start_ids), targets)
        check_mask(target_padding_mask, shape=targets.shape, name="target_padding_mask")
        return nll if target_padding_mask is None else nll.masked_fill(target_padding_mask, 0.0)

    @abstractmethod
    def _features(
        self,
        targets: Targets,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None,
        decoder_start_ids: DecoderStartIds | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the features from which each target is predicted."""

    def _check_hidden(self, hidden: Hidden, *, batch_size: int) -> None:
        """Check that hidden states fit this model and the targets.

        Raises:
            InputError: The number of rows is not that of the targets, or the width is not the model's.
            InputTypeError: They are not a tensor.
        """
        check_type("hidden", hidden, Tensor)
        rows, width = batch_size, self.config.d_model
        if hidden.ndim != 3 or (hidden.shape[0], hidden.shape[2]) != (rows, width):
            raise InputError(f"hidden has shape {tuple(hidden.shape)}; it must be ({rows}, states, {width})")

    def _embed(self, tokens: Segment) -> Hidden:
        # sqrt(D) gives the residual stream a variance near 1, while the tied output projection starts small.
        return self.embedding_dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def _initialise(self) -> None:
        """Draw the weights of linear layers and embeddings at random; biases start at 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith("output"):
                    # The residual stream of a stack is a sum over its sub-layers; keep its variance near 1.
                    std /= math.sqrt(self._count_residual_parts(name))
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embedding.reset_parameters()

    def _count_residual_parts(self, name: str) -> int:
        """Return the number of sub-layer outputs in the residual stream that this linear layer adds to."""
        raise NotImplementedError
