"""What the paper's baselines share: a state for each token, from which its successor is predicted."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.errors import InputError
from memformer.models.language_model import LanguageModel
from memformer.models.recurrence import check_tokens
from memformer.rollout import Rollout, check_mask
from memformer.shapes import AnyMemory, Hidden, Segment, SegmentPadding, Starts, Targets

TokenCounts = Int64[Tensor, " B"]
Read = Callable[..., tuple[Hidden, AnyMemory]]


class NextTokenModel(LanguageModel):
    """Reads a sequence segment by segment and predicts, at every token, the next one.

    Hidden states are (B, S, D), one for each token of the segment, and the readout is a projection alone: the n-th
    target is predicted from the n-th state, and `decode` looks at the targets for their number only. So a timestep
    reads the tokens just before its targets; `arrange` makes such a rollout of one made for a Memformer.
    """

    def arrange(self, rollout: Rollout) -> Rollout:
        """Return the same targets, each beside the token before it as its input."""
        return rollout.shifted_by_one_token()

    def initial_memory(self, batch_size: int) -> AnyMemory:
        """Return zeros for each row: nothing was read yet; float32 (float64 if the model is)."""
        return torch.zeros((batch_size, *self.memory_shape), dtype=self.memory_dtype, device=self.device)

    def encode(
        self, segment: Segment, *, memory: AnyMemory | None = None, padding_mask: SegmentPadding | None = None
    ) -> tuple[Hidden, AnyMemory]:
        """Read one segment; return the state of each token and the memory that leaves it.

        A row that is all padding leaves its memory as it was. Hidden states at padding are finite and mean nothing.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The memory that enters; None for the initial memory.
            padding_mask: True at padding; None for none.

        Raises:
            InputError: A token id or a shape is out of range, or the memory is another model's.
            InputTypeError: A dtype is wrong.
        """
        return self._encode(segment, memory, padding_mask, self._read)

    def _encode(
        self, segment: Segment, memory: AnyMemory | None, padding_mask: SegmentPadding | None, read: Read
    ) -> tuple[Hidden, AnyMemory]:
        check_tokens(segment, largest=self.bos_token_id, name="segment")
        check_mask(padding_mask, shape=segment.shape, name="padding_mask")
        memory = self._enter(memory, batch_size=segment.shape[0])
        if padding_mask is None:
            return read(self._embed(segment), memory=memory, num_tokens=None)
        # Tokens first, in their order: wherever padding was, what is computed of a row is the same, and a causal model
        # need not hide padding from tokens.
        order = padding_mask.long().argsort(dim=-1, stable=True)
        num_tokens = (~padding_mask).sum(dim=-1)
        hidden, next_memory = read(self._embed(segment.gather(1, order)), memory=memory, num_tokens=num_tokens)
        hidden = hidden.gather(1, order.argsort(dim=-1)[..., None].expand_as(hidden))
        return hidden, torch.where((num_tokens == 0)[:, None, None], memory, next_memory)

    @abstractmethod
    def _read(self, x: Hidden, *, memory: AnyMemory, num_tokens: TokenCounts | None) -> tuple[Hidden, AnyMemory]:
        """Return the states of embedded tokens, and the next memory.

        Args:
            x: Embedded tokens, those of a row first and then its padding.
            memory: The memory that enters.
            num_tokens: How many are tokens, in each row; None for all.
        """

    def _features(
        self, targets: Targets, hidden: Hidden, hidden_padding_mask: SegmentPadding | None, starts: Starts | None
    ) -> Float[Tensor, "B T D"]:
        if starts is not None:
            raise InputError(f"starts are given, but a {type(self).__name__} has no decoder to start from them")
        check_tokens(targets, largest=self.vocab_size - 1, name="targets")
        self._check_hidden(hidden, batch_size=targets.shape[0])
        # It changes nothing: a state that stands at padding predicts a target that does not count.
        check_mask(hidden_padding_mask, shape=hidden.shape[:2], name="hidden_padding_mask")
        num_targets, num_states = targets.shape[1], hidden.shape[1]
        if num_targets > num_states:
            raise InputError(
                f"targets are {num_targets} tokens a row, but hidden is {num_states} states: each state predicts one "
                "target (RecurrentModel.arrange puts each target beside the token before it)"
            )
        return hidden[:, :num_targets]

    @classmethod
    def _count_layers(cls, config: Any) -> Mapping[str, int]:
        return {"layers": config.num_layers}

    def _count_residual_parts(self, name: str) -> int:
        del name
        return 2 * self.config.num_layers
