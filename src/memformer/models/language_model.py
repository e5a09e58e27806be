"""What every model here shares: tokens in, tokens out, and how its weights start."""

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
from memformer.shapes import Hidden, Logits, Segment, SegmentPadding, Starts, TargetPadding, Targets


class LanguageModel(Pretrained, RecurrentModel):
    """A recurrence over tokens whose output projection is its embedding.

    Args:
        config: What to build.
        num_special_tokens: Token ids after `[BOS]` that can be read.
    """

    def __init__(self, config: Any, *, num_special_tokens: int = 0) -> None:
        super().__init__(config)
        self.embedding = (
            AdaptiveEmbedding(config.vocab_size, config.d_model, cutoffs=config.adaptive_cutoffs)
            if config.adaptive_cutoffs
            else TiedEmbedding(config.vocab_size, config.d_model, num_special_tokens=num_special_tokens)
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_probability)

    @property
    def vocab_size(self) -> int:
        """Number of token ids V that can be targets."""
        return self.config.vocab_size

    @property
    def bos_token_id(self) -> int:
        """The id V, which stands before the first token of a document."""
        return self.config.vocab_size

    @property
    def segment_length(self) -> int:
        """Tokens of a full segment."""
        return self.config.segment_length

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
        return self.embedding.logits(self._features(targets, hidden, hidden_padding_mask, None))

    def token_nats(
        self,
        targets: Targets,
        *,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None = None,
        target_padding_mask: TargetPadding | None = None,
        starts: Starts | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the negative log-likelihood of each target in nats, in float32 or better; 0 at padding.

        Args:
            targets: Token ids, 0 .. V-1.
            hidden: From `encode`.
            hidden_padding_mask: The padding mask that `encode` was given.
            target_padding_mask: True at targets that do not count.
            starts: What the decoder of a Memformer starts from in place of `[BOS]`.

        Raises:
            InputError: `starts` are given and this model has no decoder, or a token id or a shape is out of range.
            InputTypeError: A dtype is wrong.
        """
        nats = self.embedding.nats(self._features(targets, hidden, hidden_padding_mask, starts), targets)
        check_mask(target_padding_mask, shape=targets.shape, name="target_padding_mask")
        return nats if target_padding_mask is None else nats.masked_fill(target_padding_mask, 0.0)

    @abstractmethod
    def _features(
        self, targets: Targets, hidden: Hidden, hidden_padding_mask: SegmentPadding | None, starts: Starts | None
    ) -> Float[Tensor, "B T D"]:
        """Return what each target is predicted from."""

    def _check_hidden(self, hidden: Hidden, *, batch_size: int) -> None:
        """Check that hidden states can be this model's.

        Raises:
            InputError: They are of other rows than the targets, or of another width.
        """
        rows, width = batch_size, self.config.d_model
        if hidden.ndim != 3 or (hidden.shape[0], hidden.shape[2]) != (rows, width):
            raise InputError(f"hidden has shape {tuple(hidden.shape)}; it must be ({rows}, states, {width})")

    def _embed(self, tokens: Segment) -> Hidden:
        # sqrt(D) gives the residual stream a variance near one while the shared output projection starts small.
        return self.embedding_dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))

    def _initialise(self) -> None:
        """Draw the weights of linear maps and embeddings; biases start at 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith("output"):
                    # Each stack's residual stream is a sum over its layers' parts; keep its variance near one.
                    std /= math.sqrt(self._count_residual_parts(name))
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embedding.reset_parameters()

    def _count_residual_parts(self, name: str) -> int:
        """Return the number of parts that are added in the residual stream to which this linear map adds."""
        raise NotImplementedError
