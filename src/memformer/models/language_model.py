"""Base class of all language models: each target is a token, predicted by the tied embedding."""

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from memformer.errors import InputError
from memformer.models.token_model import TokenModel
from memformer.rollout import check_mask
from memformer.shapes import DecoderStartIds, Hidden, Logits, SegmentPadding, TargetPadding, Targets
from memformer.utils.checks import check_type


class LanguageModel(TokenModel):
    """Recurrent model over tokens, with the output projection tied to the embedding."""

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
            decoder_start_ids: Token ids that a Memformer's decoder starts from. None: `[BOS]`, in whose place a model
                with `decoder_start_tokens` puts the last token of the segment that was read.

        Raises:
            InputError: `decoder_start_ids` are given and this model has no decoder, or a token id or a shape is out of
                range.
            InputTypeError: A dtype is wrong.
        """
        if type(self).decode is not LanguageModel.decode:  # a subclass predicts in another way
            return super().token_nll(
                targets,
                hidden=hidden,
                hidden_padding_mask=hidden_padding_mask,
                target_padding_mask=target_padding_mask,
                decoder_start_ids=decoder_start_ids,
            )
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
