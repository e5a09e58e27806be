"""Base class of all models over tokens: token embedding and weight initialization."""

import math
from typing import Any

from torch import nn

from memformer.models.pretrained import Pretrained
from memformer.models.recurrence import RecurrentModel
from memformer.nn.vocabulary import AdaptiveEmbedding, TiedEmbedding
from memformer.shapes import Hidden, Segment


class TokenModel(Pretrained, RecurrentModel):
    """Recurrent model that reads tokens.

    Args:
        config: The model's config.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Only Memformers are trained on tasks that need them.
        num_special_tokens = getattr(config, "num_special_tokens", 0)
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

    def _embed(self, tokens: Segment) -> Hidden:
        # sqrt(D) gives the residual stream a variance near 1, while the tied output projection starts small.
        return self.embedding_dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def _initialise(self) -> None:
        """Draw the weights of linear layers and embeddings at random; biases start at 0."""
        if next(self.parameters()).is_meta:
            return  # loaded weights follow
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
        raise NotImplementedError  # every model defines it
