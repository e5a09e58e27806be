"""Contexts: a session's state of the tokens before the current segment, besides the memory, by kind of model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.errors import InputError, InputTypeError
from memformer.generation.compiling import CompiledFunction, compiled_function
from memformer.generation.decoding import Decoding
from memformer.generation.recording import RecordedReading, can_record, identify
from memformer.generation.token_reading import TokenReading
from memformer.models import LanguageModel, Memformer, NextTokenModel
from memformer.models.recurrence import read_bos
from memformer.shapes import Hidden, Memory
from memformer.utils.words import with_article

Rows = Int64[Tensor, " R"] | slice
PendingTokens = Int64[Tensor, "B S"]


@dataclass(frozen=True)
class PredictingStates:
    """Hidden states that the tokens of segments are predicted from, as `decode` and `token_nll` take them.

    Attributes:
        hidden: (R, S, D), a copy.
        padding_mask: True at padding of the segments that the states are of. None: no padding.
    """

    hidden: Tensor
    padding_mask: Tensor | None = None


class Reader:
    """Reads full segments: operation by operation, compiled, or on CUDA as a recorded graph.

    Args:
        model: The model.
        batch_size: Number of rows of the session; only reading all of them at once is compiled or recorded.
        compiled: Whether to compile `encode`.
    """

    # A short text is read sooner than recorded.
    _READ_BEFORE_RECORDING = 2

    def __init__(self, model: LanguageModel, batch_size: int, *, compiled: bool) -> None:
        self.model = model
        self.batch_size = batch_size
        self.compiled = compiled
        self._num_read = 0
        self._compiled: CompiledFunction | None = None
        self._recorded: RecordedReading | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_recorded": None}  # made again

    def resize(self, batch_size: int) -> None:
        """Set the number of rows of the session."""
        if batch_size != self.batch_size:
            self.batch_size = batch_size
            self._compiled = self._recorded = None

    def begin(self) -> None:
        """Prepare for the segments of one call of `Session.feed`, during which the weights do not change."""
        self._compiled = None
        if self._recorded is not None and self._recorded.weights != identify(self.model):
            self._recorded = None

    def read(self, segment: Int64[Tensor, "R S"], memory: Float[Tensor, "R K W"]) -> tuple[Tensor, Tensor]:
        """Return the hidden states and the next memory, valid until the next call."""
        model = self.model
        if segment.shape[0] != self.batch_size:
            return model.encode(segment, memory=memory)
        if self.compiled:
            if self._compiled is None:
                self._compiled = compiled_function(encode, model, (segment, memory), key=("encode", self.batch_size))
            hidden, next_memory = self._compiled(model, segment, memory)
            return hidden, next_memory
        self._num_read += 1
        if not can_record(model.device) or self._num_read <= self._READ_BEFORE_RECORDING:
            return model.encode(segment, memory=memory)
        if self._recorded is None:
            self._recorded = RecordedReading(model, segment, memory)
        return self._recorded(segment, memory)


def encode(model: LanguageModel, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return `encode` of the model, as a function that can be compiled."""
    return model.encode(segment, memory=memory)


class SegmentContext:
    """Context of a Memformer: the hidden states of the last full segment, which the decoder attends to.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
        compiled: Compile the decoding step.
    """

    def __init__(self, model: Memformer, batch_size: int, *, compiled: bool) -> None:
        self.model = model
        self.compiled = compiled
        self.hidden, self.first_memory, self.hidden_padding = read_bos(model, batch_size)
        self._decoding: Decoding | None = None
        self.reader = Reader(model, batch_size, compiled=compiled)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a session saves."""
        return {"hidden": self.hidden, "hidden_padding": self.hidden_padding}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the tensors to those of a saved session, which must have this context's shapes."""
        self.hidden = state["hidden"].to(self.hidden, copy=True)
        self.hidden_padding = state["hidden_padding"].to(self.model.device)
        self._decoding = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoding": None}  # made again from the rest

    def read(self, segments: Sequence[Tensor], *, rows: Rows, memory: Float[Tensor, "R K W"]) -> tuple[Tensor, Tensor]:
        """Read full segments (R, S) of some rows one after the other; nothing changes before `begin_segment`.

        Returns:
            The last memory, (R, K, W), and what `begin_segment` takes; valid until the next call.
        """
        del rows
        for segment in segments:
            hidden, memory = self.reader.read(segment, memory)
        return memory, hidden

    def begin_segment(self, rows: Rows, hidden: Float[Tensor, "R J D"]) -> None:
        """Set the context of rows whose segment was read."""
        self.hidden[rows] = hidden
        self.hidden_padding[rows] = False
        if self._decoding is not None:
            self._decoding.restart(_numbers_of(rows, len(self.hidden)))

    def predict(
        self, segment: Int64[Tensor, "R S"], num_tokens: list[int], *, rows: Rows, memory: Float[Tensor, "R K W"]
    ) -> PredictingStates:
        """Return the states that predict the first tokens of the current segments of some rows."""
        del segment, num_tokens, memory  # the whole segment is predicted from the one before
        padding = self.hidden_padding[rows].clone()
        return PredictingStates(self.hidden[rows].clone(), padding if padding.any() else None)

    def predict_and_read(
        self, segment: Int64[Tensor, "R S"], *, rows: Rows, memory: Float[Tensor, "R K W"]
    ) -> tuple[PredictingStates, tuple[Tensor, Tensor]]:
        """Return the states that predict the full segments of some rows, and what `read` returns."""
        states = self.predict(segment, [], rows=rows, memory=memory)
        return states, self.read([segment], rows=rows, memory=memory)

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these."""
        self.hidden = self.hidden[rows]
        self.hidden_padding = self.hidden_padding[rows]
        self.reader.resize(len(rows))
        if self._decoding is not None:
            self._decoding.select_rows(rows)

    def next_token_logits(
        self, tokens: PendingTokens, num_pending: list[int], *, memory: Memory
    ) -> Float[Tensor, "B V"]:
        """Return the next-token logits after the pending tokens of each row."""
        del memory  # the decoder sees the past only through the hidden states
        if self._decoding is None:
            self._decoding = Decoding(self.model, len(num_pending), compiled=self.compiled)
        return self._decoding.advance(tokens, num_pending, hidden=self.hidden, hidden_padding=self.hidden_padding)


class TokenContext:
    """Context of a model that predicts the next token: the token before the current segment, which is read with it.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
    """

    def __init__(self, model: NextTokenModel, batch_size: int) -> None:
        self.model = model
        self.reader = Reader(model, batch_size, compiled=False)
        self.first_memory = model.initial_memory(batch_size)
        self.previous = torch.full((batch_size, 1), model.bos_token_id, device=model.device)
        self._reading: TokenReading | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a session saves."""
        return {"previous": self.previous}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the tensors to those of a saved session, which must have this context's shapes."""
        self.previous = state["previous"].to(self.model.device)
        self._reading = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None}  # made again from the rest

    def read(self, segments: Sequence[Tensor], *, rows: Rows, memory: Float[Tensor, "R K W"]) -> tuple[Tensor, Tensor]:
        """Read full segments (R, S) of some rows one after the other; nothing changes before `begin_segment`.

        Returns:
            The last memory, (R, K, W), and what `begin_segment` takes; valid until the next call.
        """
        _, memory, previous = self._read(segments, rows=rows, memory=memory)
        return memory, previous

    def _read(self, segments: Sequence[Tensor], *, rows: Rows, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states of the last segment, and what `read` returns."""
        previous = self.previous[rows]
        for segment in segments:
            hidden, memory = self.reader.read(torch.cat([previous, segment[:, :-1]], dim=1), memory)
            previous = segment[:, -1:]
        return hidden, memory, previous

    def begin_segment(self, rows: Rows, previous: Int64[Tensor, "R 1"]) -> None:
        """Set the context of rows whose segment was read."""
        self.previous[rows] = previous
        if self._reading is not None:
            self._reading.restart(_numbers_of(rows, len(self.previous)))

    def predict(
        self, segment: Int64[Tensor, "R S"], num_tokens: list[int], *, rows: Rows, memory: Float[Tensor, "R K W"]
    ) -> PredictingStates:
        """Return the states that predict the first `num_tokens` tokens of the current segments of some rows."""
        inputs = torch.cat([self.previous[rows], segment[:, :-1]], dim=1)
        return PredictingStates(self._encode_first(inputs, num_tokens, memory))

    def predict_and_read(
        self, segment: Int64[Tensor, "R S"], *, rows: Rows, memory: Float[Tensor, "R K W"]
    ) -> tuple[PredictingStates, tuple[Tensor, Tensor]]:
        """Return the states that predict the full segments of some rows, and what `read` returns."""
        hidden, memory, previous = self._read([segment], rows=rows, memory=memory)
        return PredictingStates(hidden.clone()), (memory, previous)

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these."""
        self.previous = self.previous[rows]
        self.reader.resize(len(rows))
        if self._reading is not None:
            self._reading.select_rows(rows)

    def next_token_logits(
        self, tokens: PendingTokens, num_pending: list[int], *, memory: Memory
    ) -> Float[Tensor, "B V"]:
        """Return the next-token logits after the pending tokens of each row."""
        if self._reading is None:
            self._reading = TokenReading(self.model, len(num_pending))
        inputs = torch.cat([self.previous.cpu(), tokens], dim=1)
        hidden = self._reading.advance(inputs, [pending + 1 for pending in num_pending], memory=memory)[:, None]
        return self.model.decode(torch.zeros_like(self.previous), hidden=hidden)[:, 0]

    def _encode_first(self, inputs: Int64[Tensor, "B S"], num_tokens: list[int], memory: Memory) -> Hidden:
        """Return the hidden states of the first tokens of each row; the rest is padding."""
        index = torch.arange(inputs.shape[1], device=self.model.device)
        padding = index >= torch.tensor(num_tokens, device=self.model.device)[:, None]
        return self.model.encode(inputs, memory=memory, padding_mask=padding if padding.any() else None)[0]


def _numbers_of(rows: Rows, batch_size: int) -> Collection[int]:
    """Return the numbers of chosen rows; a slice means all."""
    return range(batch_size) if isinstance(rows, slice) else rows.tolist()


Context = SegmentContext | TokenContext


def make_context(model: LanguageModel, batch_size: int, *, compiled: bool) -> Context:
    """Return a new context for a session of this model.

    Raises:
        InputError: `compiled` is set and the model is not a Memformer or has relative positions.
        InputTypeError: The model is of a class that sessions do not know, or a Memformer with another `decode`.
    """
    if isinstance(model, Memformer):
        own = type(model)
        if own.decode is not Memformer.decode and own.decode_step is Memformer.decode_step:
            raise InputTypeError(
                f"{own.__name__} overrides decode but not decode_step, by which a session predicts one token after "
                "another; override both"
            )
        if compiled and model.config.positions != "rotary":
            # With relative positions, shapes depend on the distances that occur.
            raise InputError(f"positions ({model.config.positions!r}) must be 'rotary' to compile a session")
        return SegmentContext(model, batch_size, compiled=compiled)
    if not isinstance(model, NextTokenModel):
        raise InputTypeError(
            f"model is {with_article(type(model).__name__)}; a session needs a Memformer or a NextTokenModel "
            "(docs/own-model.md)"
        )
    if compiled:
        raise InputError(
            f"{with_article(model.config.model_type)} cannot be compiled in a session; only a memformer can"
        )
    return TokenContext(model, batch_size)
