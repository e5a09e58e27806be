"""Recall tasks as rollouts to train on: told facts, then filler, with questions on the way whose answers are predicted.

A row is one episode. Its first timestep reads the beginning-of-sequence token, as every document's does; then come the
segments that tell the facts, then up to `max_distance` segments of filler, some of which end with a question. The
answer is what must follow that segment; it is a target, and nothing else is. The next segment does not show it, so a
question never refreshes what it asks for.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.data.corpus import Corpus
from memformer.data.recall_tasks import CopyTask, Episode, PairTask, Question, RecallTask, Tokens, pad_answers, place
from memformer.data.recall_text import (
    PASSKEY_SENTENCES,
    BabiTask,
    PasskeyTask,
    read_stories,
    spell,
    story_sentences,
)
from memformer.data.stream import RolloutStream
from memformer.data.tokenizers import Tokenizer
from memformer.errors import CheckpointError, InputError
from memformer.rollout import Rollout

TaskName = Literal["fact", "associative", "rewrite", "copy", "passkey", "babi"]

# Fields that some tasks read and others do not.
_FIELDS_OF_TASK: dict[str, frozenset[str]] = {
    "fact": frozenset({"num_values", "num_fillers"}),
    "associative": frozenset({"num_keys", "num_values", "num_fillers"}),
    "rewrite": frozenset({"num_keys", "num_values", "num_fillers"}),
    "copy": frozenset({"num_values", "num_fillers"}),
    "passkey": frozenset(),
    "babi": frozenset({"path", "validation_path"}),
}

_PADDING_TOKEN_ID = 0


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """From easy to hard: the distance doubles and the facts grow by one whenever the loss has become small.

    Until the end is reached half of the rollouts have the most facts of the level, the others any number up to it: what
    is new is learned sooner, and a run of easy episodes does not pass for it.

    Args:
        start_distance: Largest distance at the start, in segments.
        start_facts: Most facts at the start.
        advance_below: Nats per answer token; a mean below it over `window` updates makes the task harder.
        window: Updates that the mean is taken over.

    Raises:
        InputError: A value is out of its range.
    """

    start_distance: int = 1
    start_facts: int = 1
    advance_below: float = 0.1
    window: int = 20

    def __post_init__(self) -> None:
        for name in ("start_distance", "start_facts", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"curriculum.{name} ({getattr(self, name)}) must be at least 1")
        if not 0 < self.advance_below < float("inf"):
            raise InputError(f"curriculum.advance_below ({self.advance_below}) must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """A recall task, made on the fly.

    Args:
        task: fact: one value to remember. associative: keys and values, every key once. rewrite: keys come again, the
            last value wins. copy: all values in order. passkey: a number hidden in the documents of the run's data.
            babi: stories of bAbI, scattered in these documents.
        path: For babi: the stories to train on; a file, a folder, a glob pattern, or a list of these. Files ending in
            .gz or .xz are uncompressed while reading.
        validation_path: For babi: the stories to evaluate on.
        num_facts: Facts of an episode in training, fewest and most. Of babi: an episode has as many as a question
            of the stories has, at most so many.
        facts_per_segment: Facts told in one segment, fewest and most; each rollout draws its own number, log-uniform.
            An evaluation tells the most.
        max_fact_gap: Segments of filler between two segments that tell facts, at most.
        max_distance: Segments from the last fact to the question in training, at most; each rollout draws its own
            horizon, log-uniform from 1.
        question_probability: How often a segment before the horizon ends with a question; the one at the horizon
            always does.
        num_keys: For associative and rewrite: keys there are.
        num_values: For fact, associative, rewrite and copy: values there are.
        num_fillers: For the same: filler words there are.
        curriculum: Starts with easier episodes; null starts with the full range.

    Raises:
        InputError: A value is out of its range, two contradict each other, one that the task needs is missing, or one
            is set that the task does not read.
    """

    task: TaskName = "fact"
    path: str | list[str] | None = None
    validation_path: str | list[str] | None = None
    num_facts: tuple[int, int] = (1, 1)
    facts_per_segment: tuple[int, int] = (1, 1)
    max_fact_gap: int = 0
    max_distance: int = 32
    question_probability: float = 0.25
    num_keys: int = 32
    num_values: int = 32
    num_fillers: int = 16
    curriculum: CurriculumConfig | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(TaskName):
            raise InputError(f"recall.task ({self.task!r}) must be one of {', '.join(get_args(TaskName))}")
        if self.task == "babi":
            for name in ("path", "validation_path"):
                if not getattr(self, name):
                    raise InputError(f"recall.{name} ({getattr(self, name)!r}) must be given for the task 'babi'")
        for field in fields(self):
            readers = [task for task, names in _FIELDS_OF_TASK.items() if field.name in names]
            value = getattr(self, field.name)
            if readers and self.task not in readers and value != field.default:
                raise InputError(
                    f"recall.{field.name} ({value!r}) is not read by the task {self.task!r}, only by "
                    f"{', '.join(readers)}"
                )
        for name in ("max_distance", "num_keys", "num_values", "num_fillers"):
            if getattr(self, name) < 1:
                raise InputError(f"recall.{name} ({getattr(self, name)}) must be at least 1")
        if self.max_fact_gap < 0:
            raise InputError(f"recall.max_fact_gap ({self.max_fact_gap}) must be at least 0")
        if not 0 <= self.question_probability <= 1:
            raise InputError(f"recall.question_probability ({self.question_probability}) must be from 0 to 1")
        for name in ("num_facts", "facts_per_segment"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise InputError(f"recall.{name} ({fewest}, {most}) must be fewest and most, at least 1")
        fewest, most = self.num_facts
        if self.task in {"fact", "passkey"} and most > 1:
            raise InputError(f"recall.num_facts ({fewest}, {most}) must be (1, 1) for the task of one fact")
        if self.task == "associative" and most > self.num_keys:
            raise InputError(f"recall.num_facts ({fewest}, {most}) needs as many different keys; num_keys is less")

    @property
    def is_in_text(self) -> bool:
        """Whether the facts are hidden in documents; the other tasks bring their own words."""
        return self.task in {"passkey", "babi"}


def make_task(config: RecallConfig) -> RecallTask:
    """Return the task that a config names, one with words of its own.

    Raises:
        InputError: The task is one in text.
    """
    symbols = {"num_values": config.num_values, "num_fillers": config.num_fillers}
    match config.task:
        case "copy":
            return CopyTask(most_facts=config.num_facts[1], **symbols)
        case "fact":
            return PairTask(rewrite=False, num_keys=1, **symbols)
        case "associative" | "rewrite":
            return PairTask(rewrite=config.task == "rewrite", num_keys=config.num_keys, **symbols)
        case "passkey" | "babi":
            raise InputError(f"recall.task ({config.task!r}) is in text; it needs a tokenizer and documents")


def make_text_task(
    config: RecallConfig, tokenizer: Tokenizer, haystack: Corpus, *, path: str | list[str] | None
) -> RecallTask:
    """Return the task in text that a config names.

    Args:
        config: The task.
        tokenizer: What the ids mean.
        haystack: Documents that the facts are hidden in.
        path: For babi: the stories, `config.path` or `config.validation_path`.

    Raises:
        InputError: The stories are missing or malformed, or all have more facts than `config.num_facts`; or the
            tokenizer lacks a word.
    """
    if path is None:
        return PasskeyTask(tokenizer, haystack)
    return BabiTask(tokenizer, haystack, read_stories(path), fewest_facts=config.num_facts[0])


def task_text(config: RecallConfig, kind: str) -> str:
    """Return all that a task in text can say in training, one sentence a line, for a tokenizer of a kind.

    Raises:
        InputError: The stories are missing or malformed.
    """
    sentences = PASSKEY_SENTENCES if config.path is None else story_sentences(read_stories(config.path))
    return "\n".join(spell(sentence, kind) for sentence in sentences)


class RecallStream(RolloutStream):
    """Rollouts of episodes, all rows of a rollout of one shape; a pure function of seed, position and level.

    An episode longer than `rollout_length` is cut: the memory goes on, the gradient does not.

    Args:
        task: What is told and asked.
        config: How episodes are laid out.
        num_lanes: Rows B.
        segment_length: Tokens S of a segment.
        rollout_length: Most timesteps of a rollout.
        bos_token_id: What the first timestep reads.
        seed: Decides every episode.

    Raises:
        InputError: A segment cannot hold the facts or the question.
    """

    def __init__(
        self,
        task: RecallTask,
        config: RecallConfig,
        *,
        num_lanes: int,
        segment_length: int,
        rollout_length: int,
        bos_token_id: int,
        seed: int,
    ) -> None:
        self.task = task
        self.config = config
        self.num_lanes = num_lanes
        self.segment_length = segment_length
        self.rollout_length = rollout_length
        self.bos_token_id = bos_token_id
        self.seed = seed
        self.level = 0
        self._recent_losses: list[float] = []
        self._episode = 0
        self._timestep = 0
        self._whole: Rollout | None = None
        check_segment_length(task, config, segment_length)

    def __iter__(self) -> "RecallStream":
        return self

    def __next__(self) -> Rollout:
        if self._whole is None:
            self._whole = self._make_episodes()
        whole, start = self._whole, self._timestep
        end = min(start + self.rollout_length, whole.num_timesteps)
        if end == whole.num_timesteps:
            self._whole, self._timestep = None, 0
            self._episode += 1
        else:
            self._timestep = end
        return whole[start:end]

    @property
    def most_facts(self) -> int:
        """Most facts of an episode at the present level."""
        fewest, most = self.config.num_facts
        curriculum = self.config.curriculum
        return most if curriculum is None else min(most, max(fewest, curriculum.start_facts + self.level))

    @property
    def max_distance(self) -> int:
        """Largest distance at the present level."""
        curriculum = self.config.curriculum
        longest = self.config.max_distance
        # 2**level is only formed where it can matter.
        if curriculum is None or self.level >= longest.bit_length():
            return longest
        return min(longest, curriculum.start_distance << self.level)

    @property
    def is_hardest(self) -> bool:
        """Whether the curriculum, if any, has reached its end."""
        return (self.most_facts, self.max_distance) == (self.config.num_facts[1], self.config.max_distance)

    def observe(self, loss: float) -> None:
        """Note the loss of an update, in nats per answer token; a small mean makes the next episodes harder."""
        curriculum = self.config.curriculum
        if curriculum is None or self.is_hardest:
            return
        self._recent_losses = [*self._recent_losses, loss][-curriculum.window :]
        if len(self._recent_losses) == curriculum.window and np.mean(self._recent_losses) < curriculum.advance_below:
            self.level += 1
            self._recent_losses = []
            self._whole, self._timestep = None, 0
            self._episode += 1

    def _make_episodes(self) -> Rollout:
        generator = np.random.Generator(np.random.PCG64([self.seed, self._episode]))
        fewest, most = self.config.num_facts[0], self.most_facts
        num_facts = int(generator.integers(min(fewest, most), most + 1))
        if not self.is_hardest and generator.random() < 0.5:
            num_facts = most
        horizon = int(np.exp(generator.uniform(0, np.log(self.max_distance + 1))))
        episodes = [self.task.make_episode(generator, num_facts) for _ in range(self.num_lanes)]
        # Of stories there may be none of just so many facts.
        num_facts = max(len(episode.facts) for episode in episodes)
        facts_per_segment = _draw_log_uniform(generator, *self.config.facts_per_segment)
        fact_timesteps = draw_fact_timesteps(self.config, generator, num_facts, facts_per_segment=facts_per_segment)
        first_question = fact_timesteps[-1] + 1
        num_timesteps = first_question + horizon
        shape = num_timesteps, self.num_lanes
        asks = generator.random(shape) < self.config.question_probability
        asks[:first_question] = False
        asks[-1] = True
        inputs = tell(self.task, episodes, fact_timesteps, range(num_timesteps), self.segment_length, generator)
        answers = [np.empty(0, np.int64)] * asks.size
        for timestep, row in np.argwhere(asks):
            questions = episodes[row].questions
            question = questions[int(generator.integers(len(questions)))]
            ask(inputs[timestep, row], question)
            answers[timestep * self.num_lanes + row] = question.answer
        targets, padding = pad_answers(answers, self.task.answer_length)
        return with_first_timestep(
            inputs,
            targets.reshape(*shape, -1),
            target_padding=padding.reshape(*shape, -1),
            bos_token_id=self.bos_token_id,
        )

    def state(self) -> dict[str, Any]:
        """Return the cursor and the curriculum's state, as JSON values."""
        return {
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "segment_length": self.segment_length,
            "episode": self._episode,
            "timestep": self._timestep,
            "level": self.level,
            "recent_losses": list(self._recent_losses),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that gave `state` was.

        Raises:
            CheckpointError: It is of another stream, or damaged; the stream stays where it was.
        """
        for name in ("seed", "num_lanes", "segment_length"):
            if state.get(name) != getattr(self, name):
                raise CheckpointError(
                    f"the data cursor has {name} {state.get(name)!r}; this stream has {getattr(self, name)!r}"
                )
        counts = [state.get(name) for name in ("episode", "timestep", "level")]
        losses = state.get("recent_losses")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise CheckpointError(f"the data cursor has episode, timestep, level {counts}; they must be counts")
        if not isinstance(losses, list) or not all(isinstance(loss, float) for loss in losses):
            raise CheckpointError(f"the data cursor has recent_losses {losses!r}; it must be a list of numbers")
        resumed = copy.copy(self)
        resumed._episode, resumed._timestep, resumed.level = (int(count or 0) for count in counts)
        resumed._recent_losses = losses
        resumed._whole = resumed._make_episodes() if resumed._timestep else None
        if resumed._whole is not None and resumed._timestep >= resumed._whole.num_timesteps:
            raise CheckpointError(f"the data cursor has timestep {counts[1]}, which episode {counts[0]} has not")
        vars(self).update(vars(resumed))


def _draw_log_uniform(generator: np.random.Generator, fewest: int, most: int) -> int:
    return int(np.exp(generator.uniform(np.log(fewest), np.log(most + 1)))) if fewest < most else most


def check_segment_length(task: RecallTask, config: RecallConfig, segment_length: int) -> None:
    """Check that segments can hold what a task puts into one.

    Raises:
        InputError: They cannot.
    """
    num_facts = min(config.facts_per_segment[1], config.num_facts[1])
    longest = max(task.question_length, num_facts * task.fact_length)
    if longest > segment_length:
        raise InputError(
            f"model.segment_length ({segment_length}) must be at least {longest}: a segment tells {num_facts} facts "
            f"(recall.facts_per_segment) of up to {task.fact_length} tokens, or ends with a question of up to "
            f"{task.question_length}"
        )


def draw_fact_timesteps(
    config: RecallConfig, generator: np.random.Generator, num_facts: int, *, facts_per_segment: int
) -> list[int]:
    """Return the timesteps that tell facts: `facts_per_segment` in each, gaps of filler between."""
    num_segments = -(-num_facts // facts_per_segment)
    gaps = generator.integers(config.max_fact_gap + 1, size=num_segments - 1)
    return [0, *(int(timestep) for timestep in np.cumsum(gaps + 1))]


def tell(
    task: RecallTask,
    episodes: Sequence[Episode],
    timesteps: Sequence[int],
    window: range,
    segment_length: int,
    generator: np.random.Generator,
) -> Tokens:
    """Return a window of filler, (timesteps, rows, tokens), in which each row's facts are told at `timesteps`."""
    shape = len(episodes), len(window), segment_length
    inputs = np.stack([task.make_filler(generator, shape[1] * shape[2]) for _ in episodes]).reshape(shape)
    for row, episode in zip(inputs, episodes, strict=True):
        share = -(-len(episode.facts) // len(timesteps))
        for index, timestep in enumerate(timesteps):
            facts = episode.facts[index * share : (index + 1) * share]
            if facts and timestep in window:
                place(row[timestep - window.start], facts, generator)
    return inputs.swapaxes(0, 1)


def ask(segment: NDArray[Any], question: Question) -> None:
    """Let a segment end with a question."""
    segment[len(segment) - len(question.tokens) :] = question.tokens


def with_first_timestep(
    inputs: Tokens, targets: Tokens, *, target_padding: NDArray[np.bool_], bos_token_id: int
) -> Rollout:
    """Return a rollout whose first timestep reads the beginning-of-sequence token, as every document's does."""

    def prepend(first: Any, rest: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.full_like(rest[:1], first), rest]))

    bos = np.zeros_like(inputs, np.bool_)
    rollout_inputs, input_padding = prepend(_PADDING_TOKEN_ID, inputs), prepend(True, bos)
    rollout_inputs[0, :, 0] = bos_token_id
    input_padding[0, :, 0] = False
    reset = torch.zeros(rollout_inputs.shape[:2], dtype=torch.bool)
    reset[0] = True
    return Rollout(
        inputs=rollout_inputs,
        targets=prepend(_PADDING_TOKEN_ID, targets),
        reset=reset,
        input_padding=input_padding,
        target_padding=prepend(True, target_padding),
    )
