"""Reading long streams into a memory that is seldom written: many segments at once."""

import torch
from jaxtyping import Int64
from torch import Tensor

from memformer.models.memory_encoder import MemoryEncoder
from memformer.models.recurrence import RecurrentModel
from memformer.shapes import Memory

# Tokens that are encoded side by side: enough for large matrix products, and little memory.
_MAX_TOKENS = 8192

# Of the segments that were encoded ahead, those after the first written one were encoded in vain. If at least the first
# share was not in vain, twice as many are encoded ahead next time; if less than the second, half as many.
_FAR_ENOUGH, _TOO_FAR = 0.9, 0.75


class AheadReader:
    """Reads segments into a model's memory; those of which nothing is written, many at once.

    In a model whose writer is sparse and whose unwritten slots stay as they are (the preset `recall`), the memory
    changes only at segments with a word worth writing. All segments up to the next such segment see the same memory, so
    they are encoded side by side, and the keys and values of the slots are computed once for all of them. The segment
    that is written is then encoded as usual, and the rest follows. How far the reader looks ahead follows from how far
    it got before. The result is that of `encode` called for each segment, up to rounding.

    Args:
        model: The model. If its writer is not sparse, or it is compiled, each segment is encoded as usual.
    """

    def __init__(self, model: RecurrentModel) -> None:
        self._model = model
        self._num_ahead = 1

    def read(self, segments: Int64[Tensor, "B N S"], *, memory: Memory) -> Memory:
        """Return the memory after all segments of each row."""
        model = self._model
        # Compiled code is for fixed shapes, but ahead every call may have another one.
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        if is_compiled or not (isinstance(model, MemoryEncoder) and model.keeps_unwritten_segments):
            for segment in segments.unbind(dim=1):
                _, memory = model.encode(segment, memory=memory)
            return memory
        return self._read_ahead(model, segments, memory.clone())

    def _read_ahead(self, model: MemoryEncoder, segments: Int64[Tensor, "B N S"], memory: Memory) -> Memory:
        num_rows, num_segments, length = segments.shape
        position = torch.zeros(num_rows, dtype=torch.int64, device=segments.device)
        while len(rows := (position < num_segments).nonzero()[:, 0]):
            if len(rows) < num_rows:
                rows = rows[: _power_of_two(len(rows))]
            first = int(position[rows].min())
            width = min(self._num_ahead, num_segments - first, max(1, _MAX_TOKENS // (len(rows) * length)))
            width = _power_of_two(width)
            if width == 1 and bool((position == first).all()):
                # All rows together, without copies of their memories.
                _, next_memory = model.encode(segments[:, first], memory=memory)
                position += 1
                if self._num_ahead == 1 and torch.equal(next_memory, memory):
                    self._num_ahead = 2
                memory = next_memory
                continue
            if width > 1:
                # A row that needs fewer segments than others reads its last one again; nothing is written of it twice.
                index = (position[rows, None] + torch.arange(width, device=rows.device)).clamp(max=num_segments - 1)
                unwritten = model.count_unwritten(segments[rows[:, None], index], memory=memory[rows])
                position[rows] = (position[rows] + unwritten).clamp(max=num_segments)
                share = float(unwritten.sum()) / (width * len(rows))
                if share >= _FAR_ENOUGH:
                    self._num_ahead = max(self._num_ahead, 2 * width)
                elif share < _TOO_FAR:
                    self._num_ahead //= 2
                rows = rows[(unwritten < width) & (position[rows] < num_segments)]
            if len(rows):
                before = memory[rows]
                _, after = model.encode(segments[rows, position[rows]], memory=before)
                memory[rows] = after
                position[rows] += 1
                if self._num_ahead == 1 and torch.equal(after, before):
                    self._num_ahead = 2
        return memory


def _power_of_two(at_most: int) -> int:
    """Return the largest power of two that is at most this number.

    Of rows and segments only such numbers are encoded side by side: on a CPU, oneDNN keeps the program and the buffers
    of every shape that it meets, about 1.6 MB each.
    """
    return 1 << at_most.bit_length() - 1
