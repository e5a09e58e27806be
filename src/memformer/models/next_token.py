"""Base class of the paper's baselines, which predict each next token from a token's hidden state."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from memformer.errors import InputError
from memformer.models.language_model import LanguageModel
from memformer.models.recurrence import check_tokens
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.rollout import Rollout, check_mask, check_targets_have_inputs
from memformer.shapes import DecoderStartIds, Hidden, Memory, Segment, SegmentPadding, Targets
from memformer.utils.words import with_article

TokenCounts = Int64[Tensor, " B"]
Read = Callable[..., tuple[Hidden, Memory]]


# A new segment has places for so many tokens; their number is doubled when it is needed.
_FIRST_PLACES = 64


def place_behind_padding(
    keep_mask: Bool[Tensor, "Q Q"], *, end: int, num_padding: Int64[Tensor, " B"]
) -> tuple[Int64[Tensor, "B Q"], Bool[Tensor, "B 1 Q Q"]]:
    """Return the positions and the mask if the last tokens before `end` are padding in each row.

    The tokens from `end` on directly follow the last token before the padding, and do not attend to it. No other token
    could: padding comes after the tokens of a segment.

    Args:
        keep_mask: The mask without padding, True where a query may attend to a key.
        end: Index behind the padding.
        num_padding: Number of tokens of padding in each row.
    """
    index = torch.arange(keep_mask.shape[-1], device=keep_mask.device)
    is_behind, num_padding = index >= end, num_padding[:, None]
    is_padding = ~is_behind & (index >= end - num_padding)  # (B, Q)
    keep_mask = keep_mask & ~(is_padding[:, None, :] & is_behind[:, None])
    return torch.where(is_behind, index - num_padding, index), keep_mask[:, None]


@dataclass(frozen=True)
class SegmentState:
    """A segment that is being read token by token: what its next tokens need of the memory and of its tokens so far.

    Attributes:
        rows: Tensors with a part for each row, (B, ...).
        shared: Tensors that are the same for all rows.
        reads_again: The tokens so far are kept as such, and read again with every new token.
    """

    rows: list[Tensor]
    shared: list[Tensor] = field(default_factory=list)
    reads_again: bool = False

    def replace_rows(self, rows: list[int], others: "SegmentState") -> None:
        """Set some rows to those of a new state of the same model, which may have places for fewer tokens."""
        for own, new in zip(self.rows, others.rows, strict=True):
            view = own[(slice(None), *(slice(size) for size in new.shape[1:]))]
            view[rows] = new

    def select_rows(self, rows: Int64[Tensor, " R"]) -> "SegmentState":
        """Return a copy of these rows."""
        return replace(self, rows=[tensor[rows] for tensor in self.rows])


class NextTokenModel(LanguageModel):
    """Model that reads a sequence segment by segment and predicts the next token at every token.

    Hidden states are (B, S, D), one for each token of the segment, and the readout is only a projection: the n-th
    target is predicted from the n-th state, and `decode` uses only the number of targets. So the inputs of a timestep
    must be the tokens just before its targets; `align_inputs` converts a rollout made for a Memformer.
    """

    def align_inputs(self, rollout: Rollout) -> Rollout:
        """Return a rollout with the same targets, each with the preceding token as its input.

        Raises:
            InputError: An input or a target is not a token id, or a timestep without input tokens has targets
                (checked on a CPU only).
        """
        check_tokens(rollout.inputs.flatten(0, 1), largest=self.bos_token_id, name="inputs")
        check_tokens(rollout.targets.flatten(0, 1), largest=self.vocab_size - 1, name="targets")
        check_targets_have_inputs(rollout, target="targets")
        return rollout.shifted_by_one_token()

    def initial_memory(self, batch_size: int) -> Memory:
        """Return an all-zero memory for each row, in float32 (float64 if the model is float64)."""
        return torch.zeros((batch_size, *self.memory_shape), dtype=self.memory_dtype, device=self.device)

    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return the hidden state of each token and the next memory.

        The memory of a row that is all padding does not change. Hidden states at padding are finite but meaningless.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`).
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding. None: no padding.
            auxiliary: Must be None: this model has no auxiliary loss.

        Raises:
            InputError: A token id or a shape is out of range, the memory is of another model, or `auxiliary` is given.
            InputTypeError: A dtype is wrong.
        """
        if auxiliary is not None:
            self.check_auxiliary_loss()
        return self._encode(segment, memory, padding_mask, self._read)

    def _encode(
        self, segment: Segment, memory: Memory | None, padding_mask: SegmentPadding | None, read: Read
    ) -> tuple[Hidden, Memory]:
        check_tokens(segment, largest=self.bos_token_id, name="segment")
        check_mask(padding_mask, shape=segment.shape, name="padding_mask")
        memory = self._enter(memory, batch_size=segment.shape[0])
        if padding_mask is None:
            return read(self._embed(segment), memory=memory, num_tokens=None)
        # Tokens are moved to the front in their order. So the results do not depend on where padding is, and a causal
        # model need not mask padding.
        keep = ~padding_mask
        num_tokens = keep.sum(dim=-1)
        place = torch.where(keep, keep.cumsum(dim=-1) - 1, padding_mask.cumsum(dim=-1) - 1 + num_tokens[:, None])
        index = torch.arange(segment.shape[1], device=segment.device).expand_as(place)
        order = torch.zeros_like(place).scatter(1, place, index)
        hidden, next_memory = read(self._embed(segment.gather(1, order)), memory=memory, num_tokens=num_tokens)
        hidden = hidden.gather(1, place[..., None].expand_as(hidden))
        return hidden, torch.where((num_tokens == 0)[:, None, None], memory, next_memory)

    @abstractmethod
    def _read(self, x: Hidden, *, memory: Memory, num_tokens: TokenCounts | None) -> tuple[Hidden, Memory]:
        """Return the hidden states of embedded tokens, and the next memory.

        Args:
            x: Embedded tokens; in each row padding follows the tokens.
            memory: The current memory.
            num_tokens: Number of tokens in each row. None: no row has padding.
        """

    def begin_segment(self, memory: Memory) -> SegmentState:
        """Return the state of a segment of which no token has been read; `read_tokens` reads them.

        By this definition all tokens of the segment are read again with every new one. The models of this package keep
        what they have computed, if neither a subclass nor another module in a layer's place may compute otherwise.
        """
        tokens = torch.full((len(memory), self.segment_length + 1), self.bos_token_id, device=self.device)
        return SegmentState([memory.clone(), tokens, torch.zeros_like(tokens[:, 0])], reads_again=True)

    def read_tokens(
        self, tokens: Segment, state: SegmentState, *, positions: Segment, num_tokens: int
    ) -> tuple[Hidden, SegmentState]:
        """Read the next tokens of a segment; return their hidden states, as `encode` of the whole segment has them.

        Args:
            tokens: Token ids, 0 .. V.
            state: What `begin_segment` or the last call returned; it may change.
            positions: Position of each token in its segment; `segment_length` marks padding, whose hidden states are
                meaningless.
            num_tokens: Number of tokens of the segment that have been read after this call, in the row with most.
        """
        memory, segment, counts = state.rows
        segment[torch.arange(len(segment), device=self.device)[:, None], positions] = tokens
        read = (positions + 1).masked_fill(positions == self.segment_length, 0).amax(dim=1)
        counts = torch.maximum(counts, read)
        padding = torch.arange(num_tokens, device=self.device) >= counts[:, None]
        hidden, _ = self.encode(segment[:, :num_tokens], memory=memory, padding_mask=padding if padding.any() else None)
        places = positions.clamp(max=num_tokens - 1)[..., None]
        state = SegmentState([memory, segment, counts], reads_again=True)
        return hidden.gather(1, places.expand(-1, -1, hidden.shape[-1])), state

    @property
    def _places_before_segment(self) -> int:
        """Number of places that the caches of keys and values have before those of the segment."""
        return 0

    def _with_places(self, caches: list[Tensor], *, num_tokens: int) -> list[Tensor]:
        """Return keys and values (B, H, L, E) with places for so many tokens of a segment, and one more for padding."""
        places = _FIRST_PLACES
        while places < num_tokens:
            places *= 2
        missing = self._places_before_segment + min(places, self.segment_length) + 1 - caches[0].shape[2]
        return [F.pad(cache, (0, 0, 0, missing)) for cache in caches] if missing > 0 else caches

    def _new_caches(self, batch_size: int) -> list[Tensor]:
        """Return places without content for the keys and values of each layer."""
        empty = self._embedded_bos().new_empty(batch_size, self.config.num_heads, 0, self.config.head_width)
        return self._with_places([empty] * (2 * self.config.num_layers), num_tokens=1)

    def _embedded_bos(self) -> Float[Tensor, "1 D"]:
        """Return `[BOS]` as layers read it, for its dtype and device."""
        bos: Tensor = self.embedding(torch.full((1,), self.bos_token_id, device=self.device))
        return bos

    def _features(
        self,
        targets: Targets,
        hidden: Hidden,
        hidden_padding_mask: SegmentPadding | None,
        decoder_start_ids: DecoderStartIds | None,
    ) -> Float[Tensor, "B T D"]:
        if decoder_start_ids is not None:
            raise InputError(
                f"decoder_start_ids are given, but {with_article(type(self).__name__)} has no decoder that could start "
                "from them"
            )
        check_tokens(targets, largest=self.vocab_size - 1, name="targets")
        self._check_hidden(hidden, batch_size=targets.shape[0])
        # The mask has no effect: a state at padding predicts a target that is not counted.
        check_mask(hidden_padding_mask, shape=hidden.shape[:2], name="hidden_padding_mask")
        num_targets, num_states = targets.shape[1], hidden.shape[1]
        if num_targets > num_states:
            raise InputError(
                f"targets have {num_targets} tokens per row, but hidden has {num_states} states per row; each state "
                "predicts one target (RecurrentModel.align_inputs aligns the inputs of a rollout with its targets)"
            )
        return hidden[:, :num_targets]

    @classmethod
    def _count_layers(cls, config: Any) -> Mapping[str, int]:
        return {"layers": config.num_layers}

    def _count_residual_parts(self, name: str) -> int:
        del name
        return 2 * self.config.num_layers
