"""Incremental reading of a session's pending tokens by a model that predicts the next token from a token's state."""

from collections.abc import Collection
from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from memformer.generation.changed_weights import WeightsTrace
from memformer.generation.pending_tokens import last_of_each_row, new_tokens
from memformer.models import NextTokenModel
from memformer.models.next_token import SegmentState
from memformer.shapes import Memory


class _Progress(NamedTuple):
    """How far the current segments are read. It is replaced as a whole, so an interrupt leaves the old or the new one.

    Attributes:
        num_read: Number of tokens of each row.
        state: The state with these tokens. None: no token was read.
        chosen: The rows of the state that became the rows of the session. None: all of them.
        ended: Rows whose state is of an earlier segment.
    """

    num_read: list[int]
    state: SegmentState | None = None
    chosen: Int64[Tensor, " R"] | None = None
    ended: frozenset[int] = frozenset()


class TokenReading:
    """The current segments, read token by token; it is derived from a session's state, so it is never saved.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
    """

    def __init__(self, model: NextTokenModel, batch_size: int) -> None:
        self.model = model
        self._trace = WeightsTrace(model)
        self._progress = _Progress([0] * batch_size)
        self._hidden: Tensor | None = None

    def restart(self, rows: Collection[int]) -> None:
        """Discard what was read of these rows, because their memory has changed."""
        ended = self._progress.ended.union(rows)
        if len(ended) == len(self._progress.num_read):
            self._progress = _Progress([0] * len(ended))
        else:
            self._progress = self._progress._replace(ended=ended)

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these. The state, which may be large, is copied when it is needed."""
        num_read, state, earlier, ended = self._progress
        numbers = rows.tolist()
        self._hidden = None if self._hidden is None else self._hidden[rows]
        self._progress = _Progress(
            num_read=[num_read[row] for row in numbers],
            state=state,
            chosen=rows if earlier is None else earlier[rows],
            ended=frozenset(place for place, row in enumerate(numbers) if row in ended),
        )

    def advance(self, inputs: Int64[Tensor, "B S"], num_inputs: list[int], *, memory: Memory) -> Float[Tensor, "B D"]:
        """Read the inputs that are not read yet; return the hidden state of each row's last one.

        Args:
            inputs: The token before each row's segment and the tokens of the segment, on the CPU.
            num_inputs: Number of inputs of each row, at least 1.
            memory: The memory of each row.
        """
        num_read, state = self._begin_segments(memory)
        num_new = [count - read for count, read in zip(num_inputs, num_read, strict=True)]
        if max(num_new) > 0:
            tokens, positions = new_tokens(
                inputs, num_new=num_new, num_read=num_read, padding_position=self.model.segment_length
            )
            device = self.model.device
            hidden, state = self.model.read_tokens(
                tokens.to(device), state, positions=positions.to(device), num_tokens=max(num_inputs)
            )
            self._hidden = last_of_each_row(hidden, num_new=num_new, earlier=self._hidden)
            self._progress = _Progress(num_inputs, state)
        assert self._hidden is not None
        return self._hidden

    def _begin_segments(self, memory: Memory) -> tuple[list[int], SegmentState]:
        """Return the number of tokens read of each row, and the state; new where the memory or the weights changed."""
        if self._trace.has_changed():  # a training step
            self.restart(range(len(memory)))
            self._trace.accept()
        num_read, state, chosen, ended = self._progress
        if state is None:
            state, num_read = self.model.begin_segment(memory), [0] * len(memory)
        else:
            state = state if chosen is None else state.select_rows(chosen)
            if ended:
                rows = sorted(ended)
                state.replace_rows(rows, self.model.begin_segment(memory[rows]))
                num_read = [0 if row in ended else read for row, read in enumerate(num_read)]
        self._progress = _Progress(num_read, state)
        return num_read, state
