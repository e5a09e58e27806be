"""Incremental reading of a session's pending tokens by a model that predicts the next token from a token's state."""

from collections.abc import Iterable

from jaxtyping import Float, Int64
from torch import Tensor

from memformer.generation.pending_tokens import WeightsTrace, last_of_each_row, new_tokens
from memformer.models import NextTokenModel
from memformer.models.next_token import SegmentState
from memformer.shapes import Memory


class TokenReading:
    """The current segments, read token by token; it is derived from a session's state, so it is never saved.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
    """

    def __init__(self, model: NextTokenModel, batch_size: int) -> None:
        self.model = model
        self._trace = WeightsTrace(model)
        # The state, and how many tokens of each row it has; one attribute, so that an interrupt cannot part them.
        self._read: tuple[SegmentState | None, list[int]] = None, [0] * batch_size
        # Rows whose memory has changed since their state was computed.
        self._ended: set[int] = set()
        self.hidden: Tensor | None = None

    def restart(self, rows: Iterable[int]) -> None:
        """Discard the tokens of these rows, because their memory has changed."""
        self._ended.update(rows)

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these, with what is read of them."""
        state, num_read = self._read
        if state is not None:
            state.select_rows(rows)
        chosen = rows.tolist()
        self._read = state, [num_read[row] for row in chosen]
        self._ended = {place for place, row in enumerate(chosen) if row in self._ended}
        self.hidden = None if self.hidden is None else self.hidden[rows]

    def advance(self, inputs: Int64[Tensor, "B S"], num_inputs: list[int], *, memory: Memory) -> Float[Tensor, "B D"]:
        """Read the inputs that are not read yet; return the hidden state of each row's last one.

        Args:
            inputs: The token before each row's segment and the tokens of the segment, on the CPU.
            num_inputs: Number of inputs of each row, at least 1.
            memory: The memory of each row.
        """
        state, num_read = self._begin_segments(memory)
        num_new = [all_ - read for all_, read in zip(num_inputs, num_read, strict=True)]
        if max(num_new) > 0:
            tokens, positions = new_tokens(
                inputs, num_inputs=num_inputs, num_read=num_read, padding_position=self.model.segment_length
            )
            device = self.model.device
            hidden, state = self.model.read_tokens(
                tokens.to(device), state, positions=positions.to(device), num_tokens=max(num_inputs)
            )
            self.hidden = last_of_each_row(hidden, num_new=num_new, earlier=self.hidden)
            self._read = state, num_inputs
        assert self.hidden is not None
        return self.hidden

    def _begin_segments(self, memory: Memory) -> tuple[SegmentState, list[int]]:
        """Return the state and the number of tokens of each row, begun anew where the memory or the weights changed."""
        state, num_read = self._read
        if self._trace.has_changed():  # a training step
            state = None
        if state is None or len(self._ended) == len(num_read):
            state, num_read = self.model.begin_segment(memory), [0] * len(num_read)
        elif self._ended:
            rows = sorted(self._ended)
            state.replace_rows(rows, self.model.begin_segment(memory[rows]))
            num_read = [0 if row in self._ended else read for row, read in enumerate(num_read)]
        self._read, self._ended = (state, num_read), set()
        return state, num_read
