"""The state of token streams that are read side by side, and reading: segment by segment, as soon as one is full."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from memformer.errors import InputError
from memformer.generation.contexts import PredictingStates, Rows, make_context
from memformer.generation.session_files import State
from memformer.models import LanguageModel
from memformer.models.recurrence import reading
from memformer.shapes import Memory

Readout = Callable[..., Tensor]

# Tokens whose readout is computed together, if segments are shorter: small products take longer than they compute.
_READOUT_TOKENS = 512


class _Waiting:
    """Segments that were read, whose readout is computed together.

    Args:
        readout: `decode` or `token_nll` of the model.
        found: The values of each row, in pieces, which this appends to.
    """

    def __init__(self, readout: Readout, found: list[list[Tensor]]) -> None:
        self._readout = readout
        self._found = found
        self._segments: list[Tensor] = []
        self._hiddens: list[Tensor] = []
        self._places: list[tuple[int, slice]] = []

    def add(self, segment: Tensor, states: PredictingStates, places: list[tuple[int, slice]]) -> None:
        """Add the segments of some rows with the states that predict them.

        Args:
            segment: (R, S).
            states: Their states.
            places: For each of them, the row and the tokens whose values are wanted.
        """
        if states.padding_mask is not None or (self._segments and segment.shape[1] != self._segments[0].shape[1]):
            self.read_out()
        self._segments.append(segment)
        self._hiddens.append(states.hidden)
        self._places += places
        if states.padding_mask is not None or len(self._places) * segment.shape[1] >= _READOUT_TOKENS:
            self.read_out(states.padding_mask)

    def read_out(self, padding_mask: Tensor | None = None) -> None:
        """Compute the values of all segments that wait."""
        if not self._segments:
            return
        hidden = torch.cat(self._hiddens)
        values = self._readout(torch.cat(self._segments), hidden=hidden, hidden_padding_mask=padding_mask).cpu()
        for index, (row, tokens) in enumerate(self._places):
            self._found[row].append(values[index, tokens])
        self._segments, self._hiddens, self._places = [], [], []


class Streams:
    """State of the rows of a session: memory, context and pending tokens of each.

    A call that is interrupted (Ctrl-C) or fails leaves the state of the tokens taken so far: the model computes before
    anything changes, and a full segment that was taken but not read is read by the next call.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
        compiled: Compile reading and decoding; see `Session`.
    """

    def __init__(self, model: LanguageModel, batch_size: int, *, compiled: bool) -> None:
        self.model = model
        self.num_pending = [0] * batch_size
        self.num_fed = [0] * batch_size
        self.num_selections = 0
        self._is_changing = False
        self._compiled, self._placement = compiled, _placement(model)
        with reading(model):
            # On the CPU, because tokens are accessed one by one.
            self.tokens = torch.zeros((batch_size, model.segment_length), dtype=torch.int64, device="cpu")
            self.context = make_context(model, batch_size, compiled=compiled)
            self.memory = self.context.first_memory.detach().clone()

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.num_pending)

    def next_token_logits(self) -> Float[Tensor, "B V"]:
        """Return the next-token logits of each row."""
        self._read_full_rows()
        with reading(self.model):
            return self.context.next_token_logits(self.tokens, self.num_pending, memory=self.memory)

    def select_rows(self, rows: list[int]) -> None:
        """Replace the rows by copies of these."""
        self._read_full_rows()
        index = torch.tensor(rows, device="cpu")
        with reading(self.model), self._changing():
            self.memory = self.memory[index.to(self.model.device)]
            self.context.select_rows(index.to(self.model.device))
            self.tokens = self.tokens[index]
            self.num_pending = [self.num_pending[row] for row in rows]
            self.num_fed = [self.num_fed[row] for row in rows]
            self.num_selections += 1

    def set_state(self, state: State) -> None:
        """Set the state to one that `check_state` has checked, converted to the model's dtypes.

        Tensors are copied: those of a file lie anywhere in memory, and matrix products on a CPU may be rounded
        differently where their operands are not aligned.
        """
        self.memory = state["memory"].to(self.memory, copy=True)
        self.context.load(state)
        self.tokens = state["tokens"]
        pending, fed = state["counts"].unbind()
        self.num_pending, self.num_fed = pending.tolist(), fed.tolist()

    def state(self) -> State:
        """Return the tensors of the state, not copied."""
        self._read_full_rows()
        return {
            "memory": self.memory,
            **self.context.tensors,
            "tokens": self.tokens,
            "counts": torch.tensor([self.num_pending, self.num_fed], device="cpu"),
        }

    def feed(self, rows: list[Tensor]) -> None:
        """Read tokens of each row, int64 tensors on the CPU."""
        self._check_unbroken()
        rest = self._take(rows)
        full = self._full_rows()
        if not full:
            return
        self.context.reader.begin()
        with reading(self.model):
            while full:
                chosen, segment = self._choose(full)
                more, rest = self._split_whole_segments(rest) if len(full) == self.batch_size else ([], rest)
                read = self.context.read([segment, *more], rows=chosen, memory=self.memory[chosen])
                self._begin_segment(full, chosen, *read, num_more=len(more))
                rest = self._take(rest)
                full = self._full_rows()

    def _read_full_rows(self) -> None:
        """Read what an interrupted call has taken but not read."""
        self._check_unbroken()
        if self._full_rows():
            self.feed([self.tokens.new_empty(0)] * self.batch_size)

    def read_out(self, rows: list[Tensor], readout: Readout) -> list[list[Tensor]]:
        """Read tokens; return for each row the values of `readout` (`decode` or `token_nll`) for them, in pieces."""
        self._check_unbroken()
        found: list[list[Tensor]] = [[] for _ in rows]
        waiting = _Waiting(readout, found)
        self.context.reader.begin()
        while any(len(row) for row in rows):
            starts = list(self.num_pending)
            rows = self._take(rows)
            ends = list(self.num_pending)
            with reading(self.model):
                for chosen, segment, states in self._predict(starts):
                    waiting.add(segment, states, [(row, slice(starts[row], ends[row])) for row in chosen])
        with reading(self.model):
            waiting.read_out()
        return found

    def _predict(self, starts: list[int]) -> Iterator[tuple[list[int], Tensor, PredictingStates]]:
        """Yield rows with new tokens, their segments so far, and the states that predict these; read full segments.

        Args:
            starts: Number of pending tokens of each row before the new ones.
        """
        full = self._full_rows()
        others = [row for row, start in enumerate(starts) if start < self.num_pending[row] < self.model.segment_length]
        if others:
            chosen, segment = self._choose(others)
            pending = [self.num_pending[row] for row in others]
            segment = segment[:, : max(pending)]
            yield others, segment, self.context.predict(segment, pending, rows=chosen, memory=self.memory[chosen])
        if full:
            chosen, segment = self._choose(full)
            states, read = self.context.predict_and_read(segment, rows=chosen, memory=self.memory[chosen])
            yield full, segment, states
            self._begin_segment(full, chosen, *read)

    def _take(self, rows: list[Tensor]) -> list[Tensor]:
        """Take tokens up to the end of each row's current segment; return the tokens after it."""
        length, rest = self.model.segment_length, []
        for row, ids in enumerate(rows):
            start = self.num_pending[row]
            count = min(length - start, len(ids))
            self.tokens[row, start : start + count] = ids[:count]
            self.num_pending[row] += count
            self.num_fed[row] += count
            rest.append(ids[count:])
        return rest

    def _split_whole_segments(self, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the segments that all rows have next, on the model's device, and the tokens after them."""
        length = self.model.segment_length
        end = min(map(len, rows)) // length * length
        # Each segment is contiguous, as the first is: a compiled or recorded reading takes tensors of one layout.
        segments = torch.stack([ids[:end].view(-1, length) for ids in rows], dim=1).to(self.model.device)
        return list(segments), [ids[end:] for ids in rows]

    def _full_rows(self) -> list[int]:
        return [row for row, pending in enumerate(self.num_pending) if pending == self.model.segment_length]

    def _choose(self, rows: list[int]) -> tuple[Rows, Tensor]:
        """Return these rows as an index, and a copy of their current segments on the model's device."""
        device = self.model.device
        if len(rows) == self.batch_size:
            return slice(None), self.tokens.to(device, copy=True)
        return torch.tensor(rows, device=device), self.tokens[rows].to(device)

    def _begin_segment(
        self, rows: list[int], chosen: Rows, memory: Memory, context: Tensor, *, num_more: int = 0
    ) -> None:
        """Set the state of rows whose segment was read, and after it a number of further segments."""
        with self._changing():
            self.memory[chosen] = memory
            self.context.begin_segment(chosen, context)
            for row in rows:
                self.tokens[row] = 0  # so that the state depends only on the tokens after the last segment
                self.num_pending[row] = 0
                self.num_fed[row] += num_more * self.model.segment_length

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the state as broken if the `with` block, which takes microseconds, does not end normally."""
        self._is_changing = True
        yield
        self._is_changing = False

    def _check_unbroken(self) -> None:
        if self._is_changing:
            raise InputError(
                "the session was interrupted while its state changed, and the state is lost; load a saved session or "
                "begin a new one"
            )
        self._follow_model()

    def _follow_model(self) -> None:
        """Convert the state if the model was moved to another device, or its weights to another dtype."""
        if self._placement == _placement(self.model):
            return
        # Nothing changes before all is there: the device may have too little memory.
        with reading(self.model):
            context = make_context(self.model, self.batch_size, compiled=self._compiled)
            context.load(self.context.tensors)
            memory = self.memory.to(context.first_memory, copy=True)
        self.context, self.memory, self._placement = context, memory, _placement(self.model)


def _placement(model: LanguageModel) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters())
    return weight.device, weight.dtype
