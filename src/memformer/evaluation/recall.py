"""Measurement of recall: accuracy on a recall task against the distance to the facts."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memformer.data.recall.config import RecallConfig
from memformer.data.recall.stream import append_question, check_segment_length, draw_fact_timesteps, insert_facts
from memformer.data.recall.tasks import Episode, RecallTask, Tokens, pad_answers
from memformer.errors import InputError
from memformer.evaluation.likelihood import Result
from memformer.evaluation.reading_ahead import AheadReader
from memformer.models.recurrence import RecurrentModel, read_bos, reading, unwrapped
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, Integers, check_integer, check_integers, check_seed
from memformer.utils.machine import peak_memory_bytes
from memformer.utils.tables import format_table

_SEGMENTS_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class RecallPoint:
    """Accuracy on a recall task at one distance.

    Attributes:
        distance: Segments from the one with the last fact to the one with the question.
        num_tokens: Number of tokens that the model has read when it answers.
        num_questions: Number of questions.
        num_right: Number of questions for which every answer token was the most likely token.
        num_right_memory_erased: The same if the question is read with the initial memory: answers that can be guessed.
        peak_memory_bytes: Peak memory up to this distance: of the device for CUDA, otherwise of this process.
    """

    distance: int
    num_tokens: int
    num_questions: int
    num_right: int
    num_right_memory_erased: int
    # A cost, not a result: it must not make two measurements unequal, because it depends on the rest of the process.
    peak_memory_bytes: int = field(compare=False)

    @property
    def accuracy(self) -> float:
        """Fraction of questions that are answered correctly."""
        return self.num_right / self.num_questions

    @property
    def accuracy_memory_erased(self) -> float:
        """Fraction of questions that are answered correctly with the initial memory."""
        return self.num_right_memory_erased / self.num_questions

    def to_dict(self) -> dict[str, float | int]:
        """Return the metrics as JSON values."""
        return {
            "distance": self.distance,
            "num_tokens": self.num_tokens,
            "num_questions": self.num_questions,
            "accuracy": self.accuracy,
            "accuracy_memory_erased": self.accuracy_memory_erased,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Recall(Result):
    """Accuracy on a recall task at several distances.

    Attributes:
        num_facts: Number of facts of every episode.
        points: Results in ascending order of distance.
    """

    num_facts: int
    points: list[RecallPoint]

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over the distances."""
        return float(np.mean([point.accuracy for point in self.points]))

    @property
    def mean_accuracy_memory_erased(self) -> float:
        """Mean accuracy over the distances with the initial memory."""
        return float(np.mean([point.accuracy_memory_erased for point in self.points]))

    @property
    def score(self) -> float:
        """Fraction of wrong answers, averaged over the distances; lower is better."""
        return 1.0 - self.mean_accuracy

    def to_log(self) -> dict[str, float]:
        """Return the metrics for the run's log."""
        means = {"accuracy": self.mean_accuracy, "accuracy_memory_erased": self.mean_accuracy_memory_erased}
        return {**means, **{f"accuracy_at_{p.distance}": p.accuracy for p in self.points}}

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as JSON values."""
        return {
            "num_facts": self.num_facts,
            "mean_accuracy": self.mean_accuracy,
            "mean_accuracy_memory_erased": self.mean_accuracy_memory_erased,
            "points": [point.to_dict() for point in self.points],
        }

    def to_line(self) -> str:
        """Return the metrics as one line of text."""
        points = "  ".join(f"{point.distance}: {point.accuracy:.2f}" for point in self.points)
        erased = f"memory erased {self.mean_accuracy_memory_erased:.2f}"
        return f"recall of {self.num_facts} at distance {points}; {erased}"

    def to_table(self) -> str:
        """Return the metrics as a table for a terminal."""
        return format_table(
            ("segments", "tokens", "accuracy", "memory erased", "questions", "peak memory"),
            [
                (
                    f"{point.distance:,}",
                    f"{point.num_tokens:,}",
                    f"{point.accuracy:.3f}",
                    f"{point.accuracy_memory_erased:.3f}",
                    f"{point.num_questions:,}",
                    f"{point.peak_memory_bytes / 2**20:,.0f} MiB",
                )
                for point in self.points
            ],
        )


def measure_recall(
    model: nn.Module,
    task: RecallTask,
    config: RecallConfig,
    *,
    distances: Integers,
    num_facts: Integer,
    num_episodes: Integer = 64,
    questions_per_episode: Integer = 4,
    seed: Integer = 0,
    progress: Callable[[int], None] | None = None,
    is_stopped: Callable[[], bool] | None = None,
) -> Recall:
    """Return the accuracy at each distance, from one pass through the filler with constant memory use.

    In every row all facts are inserted, and filler follows. At each distance the questions are read with the current
    memory, and the memory that results is discarded: questions leave no trace, and the result at one distance does not
    depend on the other distances. Each answer token must be the most likely token after the correct tokens before it,
    so an answer counts as right exactly if greedy decoding would generate it. The model's mode is left unchanged.

    Args:
        model: The model.
        task: Generator of facts, filler and questions.
        config: Layout of the facts.
        distances: Segments from the last fact to the question, each at least 1; a question in the segment right after
            the one with the last fact has distance 1.
        num_facts: Number of facts of every episode; a maximum if the task's stories have only some numbers of facts.
        num_episodes: Number of rows, read side by side.
        questions_per_episode: Maximum number of different questions for each row and distance; a row has at most the
            questions of its episode.
        seed: Seed of the episodes.
        progress: Called with the current distance after segments that were read and after the questions.
        is_stopped: Asked after segments that were read; if true, the distances that are left are not measured.

    Raises:
        InputError: A number is out of range, or the task or a segment cannot hold `num_facts` facts.
    """
    model = unwrapped(model)
    num_episodes = check_integer("num_episodes", num_episodes, 1)
    questions_per_episode = check_integer("questions", questions_per_episode, 1)
    num_facts, seed = check_integer("num_facts", num_facts, 1), check_seed("seed", seed)
    distances = check_integers("distances", distances, 1)
    if not distances:
        raise InputError("distances are empty; at least one is needed")
    _check_num_facts(task, config, num_facts, segment_length=model.segment_length)
    with reading(model):
        reader = _EpisodeReader(model, task, config, num_facts=num_facts, num_episodes=num_episodes, seed=seed)
        points = []
        for distance in sorted(set(distances)):
            if not reader.advance_to(distance, progress, is_stopped):
                break
            num_right, num_right_erased, num_questions = reader.count_right_answers(questions_per_episode)
            points.append(
                RecallPoint(
                    distance=distance,
                    num_tokens=(reader.timestep + 1) * model.segment_length,
                    num_questions=num_questions,
                    num_right=num_right,
                    num_right_memory_erased=num_right_erased,
                    peak_memory_bytes=peak_memory_bytes(model.device),
                )
            )
            if progress is not None:
                progress(distance)
    return Recall(num_facts=reader.num_facts, points=points)


def _check_num_facts(task: RecallTask, config: RecallConfig, num_facts: int, *, segment_length: int) -> None:
    try:
        # The config checks the number of facts as it does for training.
        config = dataclasses.replace(config, num_facts=(num_facts, num_facts))
        check_segment_length(task, config, segment_length)
    except InputError as error:
        raise InputError(f"num_facts ({num_facts}) does not fit the task: {error}") from error
    questions = task.make_episode(np.random.Generator(np.random.PCG64(0)), num_facts).questions
    longest = max(len(question.answer) for question in questions)
    if longest > task.answer_length:
        raise InputError(
            f"num_facts ({num_facts}) does not fit the task: an answer would have {longest} tokens, but the "
            f"task's answers have at most {task.answer_length}"
        )


class _EpisodeReader:
    """Rows of episodes whose facts have been read, and the memory while filler is read."""

    def __init__(
        self,
        model: RecurrentModel,
        task: RecallTask,
        config: RecallConfig,
        *,
        num_facts: int,
        num_episodes: int,
        seed: int,
    ) -> None:
        self.model = model
        self.task = task
        # Training draws its episodes from `RecallStream` seeds of two numbers, which must be others.
        self.seed = seed, num_facts
        self.generator = generator = np.random.Generator(np.random.PCG64([*self.seed, 1]))
        self.episodes: list[Episode] = [task.make_episode(generator, num_facts) for _ in range(num_episodes)]
        _, self.memory, _ = read_bos(model, num_episodes)
        # Stories may have fewer facts than `num_facts`; distances count from the last fact that was inserted.
        self.num_facts = max(len(episode.facts) for episode in self.episodes)
        fact_timesteps = draw_fact_timesteps(
            config, generator, self.num_facts, facts_per_segment=config.facts_per_segment[1]
        )
        self.timestep = fact_timesteps[-1] + 1
        for start in range(0, self.timestep, _SEGMENTS_AHEAD):
            window = range(start, min(start + _SEGMENTS_AHEAD, self.timestep))
            for segment in insert_facts(task, self.episodes, fact_timesteps, window, model.segment_length, generator):
                _, self.memory = model.encode(self._tensor(segment), memory=self.memory)
        self.distance = 0
        self._reader = AheadReader(model)
        # Several segments are drawn at once, so that text continues from one to the next, as in training.
        self._drawn: Tokens = np.empty((0, num_episodes, model.segment_length), dtype=np.int64)

    def advance_to(
        self, distance: int, progress: Callable[[int], None] | None, is_stopped: Callable[[], bool] | None
    ) -> bool:
        """Read filler until a question in the next segment has this distance; return whether it was not stopped."""
        while self.distance < distance - 1:
            if is_stopped is not None and is_stopped():
                return False
            if not len(self._drawn):
                self._drawn = self._filler(self.generator, _SEGMENTS_AHEAD)
            segments, self._drawn = np.split(self._drawn, [distance - 1 - self.distance])
            self.memory = self._reader.read(self._tensor(segments.swapaxes(0, 1)), memory=self.memory)
            self.timestep += len(segments)
            self.distance += len(segments)
            if progress is not None:
                progress(self.distance)
        return True

    def count_right_answers(self, questions_per_episode: int) -> tuple[int, int, int]:
        """Return the numbers of right answers, of right answers with the memory erased, and of questions.

        The reader's memory and position do not change.
        """
        # A separate generator: with the reader's, questions would change the filler that follows them.
        # (The last number must not be 0: numpy ignores a 0 at the end of a seed.)
        generator = np.random.Generator(np.random.PCG64([*self.seed, self.distance, 2]))
        num_right, num_questions = [0, 0], 0
        memories = self.memory, self.model.initial_memory(len(self.episodes))
        # Each row starts at a random question of its episode and continues in order.
        firsts = [int(generator.integers(len(episode.questions))) for episode in self.episodes]
        most_questions = max(len(episode.questions) for episode in self.episodes)
        for turn in range(min(questions_per_episode, most_questions)):
            (segments,) = self._filler(generator, 1)
            answers = []
            for segment, episode, first in zip(segments, self.episodes, firsts, strict=True):
                question = episode.questions[(first + turn) % len(episode.questions)]
                append_question(segment, question)
                answers.append(question.answer)
            targets, padding = pad_answers(answers, self.task.answer_length)
            inputs = self._tensor(segments)
            # One timestep, in the format that the model needs.
            asked = self.model.align_inputs(
                Rollout(
                    inputs=inputs[None],
                    targets=self._tensor(targets)[None],
                    target_padding=self._tensor(padding)[None],
                    targets_are_answers=True,
                )
            )
            assert asked.target_padding is not None
            asked_targets, is_unasked = asked.targets[0], asked.target_padding[0]
            # A row whose questions are used up stays in the batch but is not counted.
            counts = np.array([turn < len(episode.questions) for episode in self.episodes])
            num_questions += int(counts.sum())
            for index, memory in enumerate(memories):
                hidden, _ = self.model.encode(inputs, memory=memory)
                predicted = self.model.decode(asked_targets, hidden=hidden).argmax(dim=-1)
                is_right = ((predicted == asked_targets) | is_unasked).all(dim=-1)
                num_right[index] += int((is_right.cpu().numpy() & counts).sum())
        return num_right[0], num_right[1], num_questions

    def _filler(self, generator: np.random.Generator, num_segments: int) -> Tokens:
        """Return segments of filler, (segments, rows, tokens)."""
        shape = len(self.episodes), num_segments, self.model.segment_length
        rows = [self.task.make_filler(generator, shape[1] * shape[2]) for _ in self.episodes]
        return np.stack(rows).reshape(shape).swapaxes(0, 1)

    def _tensor(self, tokens: Tokens | NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(tokens).to(self.model.device)
