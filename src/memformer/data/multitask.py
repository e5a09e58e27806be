"""Multi-task training (arXiv 2010.06891v1): continue the text, fill in what was taken out of it, recall it.

A task is drawn for every timestep of a document but the first. Continuation is what evaluation asks. Infilling reads
the segment with spans taken out, a `[mask]` for each, and predicts it whole. Recall predicts the segment before the one
that is read, which only the memory holds. What the decoder starts from tells it the task.
"""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.corpus import Corpus
from memformer.data.lanes import LaneStream, Page
from memformer.errors import InputError

# Ids after [BOS], which the model must have (`MemformerConfig.num_special_tokens`), counted from it.
MASK, INFILLING, RECALL = 1, 2, 3
NUM_TASK_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig:
    """What is asked of a timestep, and how often.

    Args:
        continuation: Probability of predicting the next segment.
        infilling: Probability of restoring the segment that is read with spans taken out.
        recall: Probability of predicting the segment before the one that is read; a document's second timestep, where
            there is none, continues instead.
        masked_fraction: Fraction of a segment that infilling takes out. The paper does not say; this is BART's.
        mean_span: Mean of the Poisson distribution of a span's tokens; an empty span takes out one token.

    Raises:
        InputError: A probability is negative, they do not add up to 1, or another value is out of range.
    """

    continuation: float = 0.6
    infilling: float = 0.3
    recall: float = 0.1
    masked_fraction: float = 0.3
    mean_span: float = 3.5

    def __post_init__(self) -> None:
        probabilities = self.probabilities
        if not all(probability >= 0 for probability in probabilities) or abs(sum(probabilities) - 1) > 1e-6:
            raise InputError(
                f"data.multitask: continuation, infilling and recall {probabilities} must be at least 0 and add up to 1"
            )
        if not 0 < self.masked_fraction <= 1:
            raise InputError(f"data.multitask.masked_fraction ({self.masked_fraction}) must be above 0 and at most 1")
        if not 0 < self.mean_span <= 1000:
            raise InputError(f"data.multitask.mean_span ({self.mean_span}) must be above 0 and at most 1000")

    @property
    def probabilities(self) -> tuple[float, float, float]:
        """Probabilities of continuation, infilling and recall."""
        return self.continuation, self.infilling, self.recall


class MultitaskStream(LaneStream):
    """Lanes of documents in which a task is drawn for every timestep.

    The draws depend on the seed, the epoch and the document's place in it, and the timestep: not on rollouts or lanes.

    Args:
        corpus: The documents.
        tasks: What is asked.
        options: Of `LaneStream`.
    """

    def __init__(self, corpus: Corpus, tasks: MultitaskConfig, **options: Any) -> None:
        super().__init__(corpus, **options)
        self.tasks = tasks

    def _new_page(self) -> Page:
        return _TaskPage(self, self.tasks)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "multitask": list(astuple(self.tasks))}


class _TaskPage(Page):
    def __init__(self, stream: LaneStream, tasks: MultitaskConfig) -> None:
        super().__init__(stream)
        self._tasks = tasks
        self._probabilities = np.array(tasks.probabilities) / sum(tasks.probabilities)
        self._starts: NDArray[np.int64] = np.full(self._reset.shape, stream.bos_token_id, np.int64)

    def fill(self, lane: int, document: int, *, position: int, start: int, end: int, timestep: int) -> None:
        """Put a document's timesteps into rows of a lane, each with its task."""
        super().fill(lane, document, position=position, start=start, end=end, timestep=timestep)
        bos, length = self._stream.bos_token_id, self._stream.segment_length
        for row in range(start, end):
            at = timestep + row - start
            generator = np.random.default_rng([self._stream.seed or 0, position, at])
            task = generator.choice(3, p=self._probabilities)
            if task == 1 and at > 0:
                segment = self._inputs[lane, row].copy()
                masked = mask_spans(segment, self._tasks, mask_token_id=bos + MASK, generator=generator)
                self._ask(lane, row, segment, task_token_id=bos + INFILLING)
                self._inputs[lane, row, : len(masked)] = masked
                self._input_padding[lane, row] = np.arange(length) >= len(masked)
            elif task == 2 and at > 1:
                before = self._stream.corpus.document(document)[(at - 2) * length : (at - 1) * length]
                self._ask(lane, row, before, task_token_id=bos + RECALL)

    def _ask(self, lane: int, row: int, targets: NDArray[Any], *, task_token_id: int) -> None:
        self._starts[lane, row] = task_token_id
        self._targets[lane, row] = targets
        self._target_padding[lane, row] = False


def mask_spans(
    tokens: NDArray[np.int64], tasks: MultitaskConfig, *, mask_token_id: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return the tokens with spans taken out, one `[mask]` in the place of each; spans that touch are one."""
    taken = np.zeros(len(tokens), np.bool_)
    num_taken = max(1, round(tasks.masked_fraction * len(tokens)))
    while (left := num_taken - int(taken.sum())) > 0:
        length = min(max(1, int(generator.poisson(tasks.mean_span))), left)
        start = int(generator.integers(0, len(tokens) - length + 1))
        taken[start : start + length] = True
    is_first = taken & ~np.concatenate([[False], taken[:-1]])
    return np.where(is_first, mask_token_id, tokens)[~taken | is_first]
