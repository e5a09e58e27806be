"""How long and how much a memory holds: accuracy on a recall task against the distance to the facts."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memformer.data.recall.config import RecallConfig
from memformer.data.recall.stream import ask, check_segment_length, draw_fact_timesteps, tell
from memformer.data.recall.tasks import Episode, RecallTask, Tokens, pad_answers
from memformer.errors import InputError
from memformer.evaluation.likelihood import Result
from memformer.models.recurrence import RecurrentModel, in_evaluation_mode
from memformer.utils.machine import peak_memory_bytes

_SEGMENTS_AHEAD = 64


@dataclass(frozen=True, kw_only=True)
class RecallPoint:
    """How well a task is answered at one distance.

    Attributes:
        distance: Segments from the one with the last fact to the one with the question.
        num_tokens: Tokens that the model has read when it answers.
        num_questions: Questions asked.
        num_right: Questions of which every answer token was the likeliest one.
        num_right_memory_erased: The same where the question was read with the initial memory: what can be guessed.
        peak_memory_bytes: The most memory held until then: of the device for CUDA, else of this process.
    """

    distance: int
    num_tokens: int
    num_questions: int
    num_right: int
    num_right_memory_erased: int
    # Not what was found but what it took: two measurements are equal whatever the process did before.
    peak_memory_bytes: int = field(compare=False)

    @property
    def accuracy(self) -> float:
        """Right answers among all."""
        return self.num_right / self.num_questions

    @property
    def accuracy_memory_erased(self) -> float:
        """Right answers among all, with the initial memory."""
        return self.num_right_memory_erased / self.num_questions

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures as JSON values."""
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
    """Accuracy against distance.

    Attributes:
        num_facts: Facts of every episode.
        points: From the smallest distance to the largest.
    """

    num_facts: int
    points: list[RecallPoint]

    @property
    def mean_accuracy(self) -> float:
        """Mean of the points' accuracies."""
        return float(np.mean([point.accuracy for point in self.points]))

    @property
    def mean_accuracy_memory_erased(self) -> float:
        """Mean of the points' accuracies with the initial memory."""
        return float(np.mean([point.accuracy_memory_erased for point in self.points]))

    @property
    def score(self) -> float:
        """Part of the answers that is wrong; the lower the better."""
        return 1.0 - self.mean_accuracy

    def to_log(self) -> dict[str, float]:
        """Return what the run's log holds of it."""
        means = {"accuracy": self.mean_accuracy, "accuracy_memory_erased": self.mean_accuracy_memory_erased}
        return {**means, **{f"accuracy_at_{p.distance}": p.accuracy for p in self.points}}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "num_facts": self.num_facts,
            "mean_accuracy": self.mean_accuracy,
            "mean_accuracy_memory_erased": self.mean_accuracy_memory_erased,
            "points": [point.to_dict() for point in self.points],
        }

    def to_line(self) -> str:
        """Return the figures as one line."""
        points = "  ".join(f"{point.distance}: {point.accuracy:.2f}" for point in self.points)
        erased = f"memory erased {self.mean_accuracy_memory_erased:.2f}"
        return f"recall of {self.num_facts} at distance {points}; {erased}"

    def to_table(self) -> str:
        """Return the figures as a table for a terminal."""
        rows = ["  segments      tokens  accuracy  memory erased  questions  peak memory"]
        rows += [
            f"{p.distance:10,}{p.num_tokens:12,}{p.accuracy:10.3f}{p.accuracy_memory_erased:15.3f}{p.num_questions:11,}"
            f"{p.peak_memory_bytes / 2**20:9,.0f} MiB"
            for p in self.points
        ]
        return "\n".join(rows)


@torch.no_grad()
def measure_recall(
    model: RecurrentModel,
    task: RecallTask,
    config: RecallConfig,
    *,
    distances: Sequence[int],
    num_facts: int,
    num_episodes: int = 64,
    questions_per_episode: int = 4,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Recall:
    """Return the accuracy at each distance, all from one walk through the filler, at constant memory.

    Every row tells its facts and then reads filler without end. At each distance the questions are read with the
    memory of that moment, and then taken back: they leave no trace, and what is found at a distance does not depend on
    which others are asked for. Each answer token is the likeliest one after the right ones before it, so an answer
    counts as right exactly where greedy decoding would give it. The model's mode is left as it was.

    Args:
        model: The model.
        task: What is told and asked.
        config: How facts are laid out.
        distances: Segments from the last fact to the question, each at least 1; a question in the segment right after
            the one with the last fact has distance 1.
        num_facts: Facts of every episode; at most, where the task has stories of some lengths only.
        num_episodes: Rows, read side by side.
        questions_per_episode: Different questions asked of each row at each distance, at most; a row has as many as its
            episode.
        seed: Decides the episodes.
        progress: Called with the distance reached, after every segment and after the questions.

    Raises:
        InputError: A number is out of its range, or the task or a segment cannot hold so many facts.
    """
    positive = {"num_episodes": num_episodes, "questions": questions_per_episode}
    for name, value in positive.items():
        if value < 1:
            raise InputError(f"{name} ({value}) must be at least 1")
    if not distances or min(distances) < 1:
        raise InputError(
            f"distances ({', '.join(map(str, distances))}) must be at least 1 segment each, and at least one"
        )
    _check_num_facts(task, config, num_facts, segment_length=model.segment_length)
    with in_evaluation_mode(model):
        walk = _Walk(model, task, config, num_facts=num_facts, num_episodes=num_episodes, seed=seed)
        points = []
        for distance in sorted(set(distances)):
            walk.advance_to(distance, progress)
            right, right_erased, asked = walk.ask(questions_per_episode)
            points.append(
                RecallPoint(
                    distance=distance,
                    num_tokens=(walk.timestep + 1) * model.segment_length,
                    num_questions=asked,
                    num_right=right,
                    num_right_memory_erased=right_erased,
                    peak_memory_bytes=peak_memory_bytes(model.device),
                )
            )
            if progress is not None:
                progress(distance)
    return Recall(num_facts=walk.num_facts, points=points)


def _check_num_facts(task: RecallTask, config: RecallConfig, num_facts: int, *, segment_length: int) -> None:
    try:
        # What the config would refuse to train on cannot be asked for here either.
        config = dataclasses.replace(config, num_facts=(num_facts, num_facts))
        check_segment_length(task, config, segment_length)
    except InputError as error:
        raise InputError(f"num_facts ({num_facts}) does not fit the task: {error}") from error
    questions = task.make_episode(np.random.Generator(np.random.PCG64(0)), num_facts).questions
    longest = max(len(question.answer) for question in questions)
    if longest > task.answer_length:
        raise InputError(
            f"num_facts ({num_facts}) does not fit the task: an answer would have {longest} tokens, and the task's "
            f"have at most {task.answer_length}"
        )


class _Walk:
    """Rows of episodes, whose facts have been told, on their way through the filler."""

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
        self.seed = seed, num_facts
        self.generator = generator = np.random.Generator(np.random.PCG64(self.seed))
        self.episodes: list[Episode] = [task.make_episode(generator, num_facts) for _ in range(num_episodes)]
        bos = torch.full((num_episodes, 1), model.bos_token_id, device=model.device)
        _, self.memory = model.encode(bos, memory=model.initial_memory(num_episodes))
        # Stories have as many facts as they have, at most those asked for; the distance counts from the last one told.
        self.num_facts = max(len(episode.facts) for episode in self.episodes)
        fact_timesteps = draw_fact_timesteps(
            config, generator, self.num_facts, facts_per_segment=config.facts_per_segment[1]
        )
        self.timestep = fact_timesteps[-1] + 1
        for start in range(0, self.timestep, _SEGMENTS_AHEAD):
            window = range(start, min(start + _SEGMENTS_AHEAD, self.timestep))
            for segment in tell(task, self.episodes, fact_timesteps, window, model.segment_length, generator):
                _, self.memory = model.encode(self._tensor(segment), memory=self.memory)
        self.distance = 0
        # Text runs on over some segments, as it does in training.
        self._ahead: list[Tokens] = []

    def advance_to(self, distance: int, progress: Callable[[int], None] | None) -> None:
        """Read filler until a question in the next segment has this distance."""
        while self.distance < distance - 1:
            if not self._ahead:
                self._ahead = list(self._filler(self.generator, _SEGMENTS_AHEAD))
            _, self.memory = self.model.encode(self._tensor(self._ahead.pop(0)), memory=self.memory)
            self.timestep += 1
            self.distance += 1
            if progress is not None:
                progress(self.distance)

    def ask(self, questions_per_episode: int) -> tuple[int, int, int]:
        """Ask each row; return the right answers, those with the memory erased, and the questions.

        The walk itself does not move.
        """
        # Randomness of its own: drawn from the walk's, questions would change the filler that comes after them.
        # (The distance is never 0 here: numpy takes a seed with a 0 at its end for the seed without.)
        generator = np.random.Generator(np.random.PCG64([*self.seed, self.distance + 1]))
        num_right, num_asked = [0, 0], 0
        memories = self.memory, self.model.initial_memory(len(self.episodes))
        # Each row starts at a random question of its own and then takes the next ones.
        firsts = [int(generator.integers(len(episode.questions))) for episode in self.episodes]
        most_questions = max(len(episode.questions) for episode in self.episodes)
        for turn in range(min(questions_per_episode, most_questions)):
            (segments,) = self._filler(generator, 1)
            answers = []
            for segment, episode, first in zip(segments, self.episodes, firsts, strict=True):
                question = episode.questions[(first + turn) % len(episode.questions)]
                ask(segment, question)
                answers.append(question.answer)
            targets, padding = pad_answers(answers, self.task.answer_length)
            # A row that has been asked everything is read along with the others, and not counted again.
            counts = np.array([turn < len(episode.questions) for episode in self.episodes])
            num_asked += int(counts.sum())
            for index, memory in enumerate(memories):
                hidden, _ = self.model.encode(self._tensor(segments), memory=memory)
                predicted = self.model.decode(self._tensor(targets), hidden=hidden).argmax(dim=-1).cpu().numpy()
                is_right = ((predicted == targets) | padding).all(axis=-1)
                num_right[index] += int((is_right & counts).sum())
        return num_right[0], num_right[1], num_asked

    def _filler(self, generator: np.random.Generator, num_segments: int) -> Tokens:
        """Return segments of filler, (segments, rows, tokens)."""
        shape = len(self.episodes), num_segments, self.model.segment_length
        rows = [self.task.make_filler(generator, shape[1] * shape[2]) for _ in self.episodes]
        return np.stack(rows).reshape(shape).swapaxes(0, 1)

    def _tensor(self, tokens: Tokens) -> Tensor:
        return torch.from_numpy(tokens).to(self.model.device)
