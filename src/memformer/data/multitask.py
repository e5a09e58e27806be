"""Multi-task training of the paper's first version (arXiv 2010.06891v1): continuation, infilling and recall.

A task is drawn for every timestep of a document except the first. Continuation predicts the next segment and is the
only task of evaluation. Infilling reads the segment with each masked span replaced by one `[mask]`, and predicts the
whole segment. Recall predicts the segment before the one that is read, which only the memory holds. The decoder's start
token selects the task.
"""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.corpus import Corpus
from memformer.data.lanes import LaneStream, RolloutBuffer
from memformer.errors import InputError
from memformer.utils.checks import check_number
from memformer.utils.fields import convert_fields

# Offsets of the task tokens from [BOS]; the model must have these ids (`MemformerConfig.num_special_tokens`).
MASK, INFILLING, RECALL = 1, 2, 3
NUM_TASK_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig:
    """The mix of training tasks: continuation, infilling and recall.

    Args:
        continuation: Probability of predicting the next segment.
        infilling: Probability of reading the segment with spans masked and predicting the whole segment.
        recall: Probability of predicting the segment before the one that is read. A document's second timestep has no
            such segment and uses continuation instead.
        masked_fraction: Fraction of a segment's tokens that infilling masks. The paper gives no value; the default is
            BART's.
        mean_span: Mean length of a masked span, in tokens. Lengths follow a Poisson distribution; a length of 0 masks
            one token.

    Raises:
        InputError: A probability is negative, the probabilities do not add up to 1, or another value is out of range.
    """

    continuation: float = 0.6
    infilling: float = 0.3
    recall: float = 0.1
    masked_fraction: float = 0.3
    mean_span: float = 3.5

    def __post_init__(self) -> None:
        convert_fields(self, prefix="data.multitask.")
        probabilities = self.probabilities
        if not all(probability >= 0 for probability in probabilities) or abs(sum(probabilities) - 1) > 1e-6:
            raise InputError(
                f"data.multitask: continuation, infilling and recall {probabilities} must be at least 0 and add up to 1"
            )
        check_number("data.multitask.masked_fraction", self.masked_fraction, above=0, maximum=1)
        check_number("data.multitask.mean_span", self.mean_span, above=0, maximum=1000)

    @property
    def probabilities(self) -> tuple[float, float, float]:
        """Probabilities of continuation, infilling and recall."""
        return self.continuation, self.infilling, self.recall


class MultitaskStream(LaneStream):
    """A `LaneStream` with a task drawn for every timestep.

    The draws depend on the seed, the epoch, the document's position in the epoch and the timestep, but not on rollouts
    or lanes.

    Args:
        corpus: The documents.
        tasks: The mix of tasks.
        options: Keyword arguments of `LaneStream`.
    """

    def __init__(self, corpus: Corpus, tasks: MultitaskConfig, **options: Any) -> None:
        super().__init__(corpus, **options)
        self.tasks = tasks

    def _new_buffer(self) -> RolloutBuffer:
        return _TaskBuffer(self, self.tasks)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "multitask": list(astuple(self.tasks))}


class _TaskBuffer(RolloutBuffer):
    def __init__(self, stream: LaneStream, tasks: MultitaskConfig) -> None:
        super().__init__(stream)
        self._tasks = tasks
        self._probabilities = np.array(tasks.probabilities) / sum(tasks.probabilities)
        self._decoder_start_ids: NDArray[np.int64] = np.full(self._reset.shape, stream.bos_token_id, np.int64)

    def fill(self, lane: int, document: int, *, position: int, start: int, end: int, timestep: int) -> None:
        """Write a document's timesteps into a lane, each with its task."""
        super().fill(lane, document, position=position, start=start, end=end, timestep=timestep)
        bos, length = self._stream.bos_token_id, self._stream.segment_length
        for row in range(start, end):
            at = timestep + row - start
            generator = np.random.default_rng([self._stream.seed or 0, position, at])
            task = generator.choice(3, p=self._probabilities)
            if task == 1 and at > 0:
                segment = self._inputs[lane, row].copy()
                masked = mask_spans(segment, self._tasks, mask_token_id=bos + MASK, generator=generator)
                self._set_task(lane, row, segment, task_token_id=bos + INFILLING)
                self._inputs[lane, row, : len(masked)] = masked
                self._input_padding[lane, row] = np.arange(length) >= len(masked)
            elif task == 2 and at > 1:
                previous = self._stream.corpus.document(document)[(at - 2) * length : (at - 1) * length]
                self._set_task(lane, row, previous, task_token_id=bos + RECALL)

    def _set_task(self, lane: int, row: int, targets: NDArray[Any], *, task_token_id: int) -> None:
        self._decoder_start_ids[lane, row] = task_token_id
        self._targets[lane, row] = targets
        self._target_padding[lane, row] = False


def mask_spans(
    tokens: NDArray[np.int64], tasks: MultitaskConfig, *, mask_token_id: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return the tokens with each masked span replaced by one `[mask]`; adjacent spans count as one."""
    is_masked = np.zeros(len(tokens), np.bool_)
    num_masked = max(1, round(tasks.masked_fraction * len(tokens)))
    while (left := num_masked - int(is_masked.sum())) > 0:
        length = min(max(1, int(generator.poisson(tasks.mean_span))), left)
        start = int(generator.integers(0, len(tokens) - length + 1))
        is_masked[start : start + length] = True
    is_first = is_masked & ~np.concatenate([[False], is_masked[:-1]])
    return np.where(is_first, mask_token_id, tokens)[~is_masked | is_first]
