"""Streams of rollouts from a corpus: lanes read one document after another, and a cursor resumes exactly."""

import heapq
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from memformer.data.corpus import Corpus
from memformer.data.stream import RolloutStream
from memformer.errors import CheckpointError, InputError
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, check_integer, check_seed, check_type
from memformer.utils.words import counted

PADDING_TOKEN_ID = 0

# Cursor value of a lane without a document, and of the seed of a stream that does not shuffle.
_NONE = -1
# Missing in the cursors of version 0.1.
_FINGERPRINT = "documents_fingerprint"


class _Lane(NamedTuple):
    """Position of a lane: the `position`-th document of the stream (_NONE: no document), before `timestep`."""

    position: int
    timestep: int


class LaneStream(RolloutStream):
    """A stream of rollouts in which each of B lanes reads whole documents, one after another.

    Documents are assigned in one global order, and a lane that finishes a document gets the next one. The order runs
    epoch after epoch; within an epoch it is the corpus's order or, with a seed, a permutation that depends only on seed
    and epoch. A document of n tokens takes ceil(n / S) timesteps. Its first timestep has `reset` set, reads the
    beginning-of-sequence token followed by padding, and predicts the first S tokens; timestep t reads tokens (t-1)S to
    tS and predicts tokens tS to (t+1)S. Every token is therefore predicted once, and every token except those of the
    last segment is read once. Rows without a document are all padding.

    The assignment of documents to lanes and timesteps does not depend on `rollout_length`. `state` and `load_state`
    resume exactly from any point.

    Args:
        corpus: The documents.
        num_lanes: Number of rows B.
        segment_length: Tokens S of a segment.
        rollout_length: Timesteps N of a rollout; the last rollout of a finite stream may have fewer, so that no
            timestep is all padding.
        bos_token_id: Token that the first timestep of a document reads; usually an id beyond the corpus's vocabulary.
        seed: Shuffles the documents, differently in every epoch. None: the corpus's order.
        num_epochs: Number of passes over all documents. None: the stream is endless.

    Raises:
        InputError: A number is out of range, or the corpus of an endless stream has fewer tokens than a segment or
            fewer documents than lanes.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        num_lanes: Integer,
        segment_length: Integer,
        rollout_length: Integer,
        bos_token_id: Integer,
        seed: Integer | None = None,
        num_epochs: Integer | None = None,
    ) -> None:
        check_type("corpus", corpus, Corpus, hint="; corpus_from_arrays makes one of token ids")
        num_lanes = check_integer("num_lanes", num_lanes, 1)
        segment_length = check_integer("segment_length", segment_length, 1)
        rollout_length = check_integer("rollout_length", rollout_length, 1)
        num_epochs = None if num_epochs is None else check_integer("num_epochs", num_epochs, 1)
        bos_token_id = check_integer("bos_token_id", bos_token_id, 0)
        seed = None if seed is None else check_seed("seed", seed)
        if num_epochs is None and corpus.num_tokens < segment_length:
            raise InputError(
                f"{corpus.name} holds {corpus.num_tokens} tokens; at least one segment of {segment_length} is needed"
            )
        if num_epochs is None and num_lanes > corpus.num_documents:
            # Half of the tokens of a lane: there are then enough pieces even if up to half of them are held out.
            max_document_tokens = max(1, corpus.num_tokens // (2 * num_lanes))
            raise InputError(
                f"{corpus.name} has {counted(corpus.num_documents, 'document')} for {num_lanes} lanes; set "
                f"training.num_lanes to at most {corpus.num_documents}, or, except for images, "
                f"data.max_document_tokens to at most {max_document_tokens} to cut documents up"
            )
        self.corpus = corpus
        self.num_lanes = num_lanes
        self.segment_length = segment_length
        self.rollout_length = rollout_length
        self.bos_token_id = bos_token_id
        self.seed = seed
        self._num_positions = None if num_epochs is None else num_epochs * corpus.num_documents
        self._next_position = 0
        self._lanes = [_Lane(_NONE, 0)] * num_lanes
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __iter__(self) -> "LaneStream":
        return self

    def __next__(self) -> Rollout:
        result = self.next_with_documents()
        if result is None:
            raise StopIteration
        return result[0]

    def next_with_documents(self) -> tuple[Rollout, Int64[Tensor, "N B"]] | None:
        """Return the next rollout, and the corpus index of the document at every timestep and row.

        Returns:
            The rollout and the indices, -1 where a row has no document; None at the end of the stream.
        """
        buffer = self._new_buffer()
        # Heap of free lanes, ordered by the timestep at which they become free, then by number.
        free = [(0, lane) for lane in range(self.num_lanes)]
        num_timesteps = 0
        while free:
            start, lane = heapq.heappop(free)
            if self._lanes[lane].position == _NONE:
                self._assign_document(lane)
            position, timestep = self._lanes[lane]
            if position == _NONE:
                continue
            document = self._document_at(position)
            num_left = self._num_timesteps(document) - timestep
            end = min(start + num_left, self.rollout_length)
            buffer.fill(lane, document, position=position, start=start, end=end, timestep=timestep)
            num_timesteps = max(num_timesteps, end)
            is_finished = end - start == num_left
            self._lanes[lane] = _Lane(_NONE, 0) if is_finished else _Lane(position, timestep + end - start)
            if end < self.rollout_length:
                heapq.heappush(free, (end, lane))
        return buffer.cut(num_timesteps) if num_timesteps else None

    def _new_buffer(self) -> "RolloutBuffer":
        return RolloutBuffer(self)

    def _assign_document(self, lane: int) -> None:
        if self._num_positions is None or self._next_position < self._num_positions:
            self._lanes[lane] = _Lane(self._next_position, 0)
            self._next_position += 1

    def _document_at(self, position: int) -> int:
        epoch, index = divmod(position, self.corpus.num_documents)
        if self.seed is None:
            return index
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            # A lane with a long document may be epochs behind the others; orders that no lane uses are dropped.
            in_use = {lane.position // self.corpus.num_documents for lane in self._lanes if lane.position != _NONE}
            self._orders = {past: order for past, order in self._orders.items() if past in in_use}
            self._orders[epoch] = generator.permutation(self.corpus.num_documents)
        return int(self._orders[epoch][index])

    def _num_timesteps(self, document: int) -> int:
        return -(-int(self.corpus.document_lengths[document]) // self.segment_length)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_lanes": self.num_lanes,
            "segment_length": self.segment_length,
            "seed": _NONE if self.seed is None else self.seed,
            "num_documents": self.corpus.num_documents,
            "num_tokens": self.corpus.num_tokens,
            "document_lengths_crc32": zlib.crc32(self.corpus.document_lengths.astype("<i8").tobytes()),
            _FINGERPRINT: self.corpus.fingerprint,
        }

    def state(self) -> dict[str, Any]:
        """Return the cursor, a few integers that JSON can hold; `load_state` resumes from it."""
        return {
            **self._identity(),
            "next_document": self._next_position,
            "lane_documents": [lane.position for lane in self._lanes],
            "lane_timesteps": [lane.timestep for lane in self._lanes],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a cursor that `state` returned.

        Args:
            state: Cursor of a stream with the same corpus, lanes, segment length and seed; the rollout length and the
                number of epochs may differ.

        Raises:
            CheckpointError: The cursor belongs to another stream or is damaged; this stream's position is unchanged.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected and (name != _FINGERPRINT or name in state):
                raise CheckpointError(
                    f"the data cursor has {name} {_format_value(name, state.get(name))}; this stream has "
                    f"{_format_value(name, expected)}"
                )
        next_position = state.get("next_document")
        positions, timesteps = state.get("lane_documents"), state.get("lane_timesteps")
        if not _is_count(next_position):
            raise CheckpointError(
                f"the data cursor has next_document {next_position!r}; it must be a non-negative integer"
            )
        if not _are_integers(positions, self.num_lanes) or not _are_integers(timesteps, self.num_lanes):
            raise CheckpointError(
                f"the data cursor's lane_documents and lane_timesteps must hold {self.num_lanes} integers each"
            )
        lanes = [_Lane(*pair) for pair in zip(positions, timesteps, strict=True)]
        occupied = [position for position in positions if position != _NONE]
        if len(set(occupied)) != len(occupied):
            raise CheckpointError(
                f"the data cursor has lane_documents {positions}; two lanes cannot read the same document"
            )
        for number, lane in enumerate(lanes):
            if not self._is_possible(lane, next_position):
                raise CheckpointError(
                    f"the data cursor has lane {number} in document {lane.position} before timestep {lane.timestep}, "
                    "a position that this stream cannot have"
                )
        self._next_position = next_position
        self._lanes = lanes

    def _is_possible(self, lane: _Lane, next_position: int) -> bool:
        if lane.position == _NONE:
            return lane.timestep == 0
        if not 0 <= lane.position < next_position:
            return False
        return 0 < lane.timestep < self._num_timesteps(self._document_at(lane.position))


class RolloutBuffer:
    """The arrays of a rollout under construction; lanes come first, so that a document is one contiguous copy."""

    def __init__(self, stream: LaneStream) -> None:
        self._stream = stream
        shape = stream.num_lanes, stream.rollout_length, stream.segment_length
        self._inputs = np.full(shape, PADDING_TOKEN_ID, np.int64)
        self._targets = np.full(shape, PADDING_TOKEN_ID, np.int64)
        self._input_padding = np.ones(shape, np.bool_)
        self._target_padding = np.ones(shape, np.bool_)
        self._reset = np.zeros(shape[:2], np.bool_)
        self._documents = np.full(shape[:2], _NONE, np.int64)
        self._decoder_start_ids: NDArray[np.int64] | None = None

    def fill(self, lane: int, document: int, *, position: int, start: int, end: int, timestep: int) -> None:
        """Write a document's timesteps, from `timestep` on, into the rollout's timesteps `start` to `end` of a lane.

        Args:
            lane: The lane.
            document: Index in the corpus.
            position: Position in the stream's order, in which each epoch's documents have separate positions.
            start: First timestep of the rollout to fill.
            end: Timestep after the last one to fill.
            timestep: The document's timestep that is written at `start`.
        """
        del position
        length = self._stream.segment_length
        tokens = self._stream.corpus.document(document)
        self._documents[lane, start:end] = document

        predicted = tokens[timestep * length : (timestep + end - start) * length]
        num_whole, num_rest = divmod(len(predicted), length)
        whole, rest = slice(start, start + num_whole), start + num_whole
        self._targets[lane, whole] = predicted[: num_whole * length].reshape(-1, length)
        self._target_padding[lane, whole] = False
        if num_rest:  # a document's last segment
            self._targets[lane, rest, :num_rest] = predicted[num_whole * length :]
            self._target_padding[lane, rest, :num_rest] = False

        if timestep == 0:
            self._reset[lane, start] = True
            self._inputs[lane, start, 0] = self._stream.bos_token_id
            self._input_padding[lane, start, 0] = False
            start, timestep = start + 1, 1
        # A timestep reads the segment that the previous timestep predicted, which is always whole.
        read = tokens[(timestep - 1) * length : (timestep - 1 + end - start) * length]
        self._inputs[lane, start:end] = read.reshape(-1, length)
        self._input_padding[lane, start:end] = False

    def cut(self, num_timesteps: int) -> tuple[Rollout, Tensor]:
        """Return the first `num_timesteps` timesteps as a rollout, and the indices of their documents."""

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[:, :num_timesteps].swapaxes(0, 1)))

        def mask(array: NDArray[np.bool_]) -> Tensor | None:
            return tensor(array) if array[:, :num_timesteps].any() else None

        rollout = Rollout(
            inputs=tensor(self._inputs),
            targets=tensor(self._targets),
            reset=tensor(self._reset),
            input_padding=mask(self._input_padding),
            target_padding=mask(self._target_padding),
            decoder_start_ids=None if self._decoder_start_ids is None else tensor(self._decoder_start_ids),
        )
        return rollout, tensor(self._documents)


def _format_value(name: str, value: Any) -> str:
    return "None" if name == "seed" and value == _NONE else repr(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_integers(values: Any, number: int) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) == number
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    )
