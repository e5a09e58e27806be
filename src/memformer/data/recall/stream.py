"""Recall tasks as training rollouts: inserted facts, then filler, and appended questions whose answers are the targets.

A row is one episode. Its first timestep reads the beginning-of-sequence token, as in every document. The segments with
the facts follow, then up to `max_distance` segments of filler, some of which end with a question. The answer is the
target of such a segment; other segments have no targets. The next segment does not contain the answer, so a question
never refreshes its fact.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.data.corpus import Corpus
from memformer.data.lanes import PADDING_TOKEN_ID
from memformer.data.recall.config import RecallConfig
from memformer.data.recall.tasks import CopyTask, Episode, PairTask, Question, RecallTask, Tokens, pad_answers, write_at
from memformer.data.recall.text_tasks import (
    PASSKEY_SENTENCES,
    BabiTask,
    PasskeyTask,
    TextTask,
    read_stories,
    spell,
    story_sentences,
)
from memformer.data.stream import RolloutStream
from memformer.data.tokenizers import Tokenizer
from memformer.errors import CheckpointError, InputError
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, check_integer, check_seed
from memformer.utils.words import counted

# Once the curriculum has ended, filler becomes known within so many episodes, a growing share of it in each.
_EPISODES_UNTIL_FILLER_IS_KNOWN = 300
# Segments of the documents that the model reads to find decoys beside an update, and the most that are remembered.
_SEGMENTS_TO_MINE = 512
_MOST_MINED = 128
# Missing in the cursors of version 0.1.
_FINGERPRINT = "task_fingerprint"


def make_task(config: RecallConfig) -> RecallTask:
    """Return the configured task, for tasks with a vocabulary of their own.

    Raises:
        InputError: The task hides its facts in documents.
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
            raise InputError(f"data.recall.task ({config.task!r}) needs a tokenizer and documents; use make_text_task")


def make_text_task(
    config: RecallConfig, tokenizer: Tokenizer, haystack: Corpus, *, path: str | list[str] | None
) -> RecallTask:
    """Return the configured task, for tasks that hide their facts in documents.

    Args:
        config: The task.
        tokenizer: Tokenizer of the documents, the facts and the questions.
        haystack: Documents that hide the facts.
        path: For babi: the stories, `config.path` or `config.validation_path`. For passkey: None.

    Raises:
        InputError: The stories are missing or malformed, every question has more facts than `config.num_facts` allows,
            or the tokenizer lacks a word.
    """
    if path is None:
        return PasskeyTask(tokenizer, haystack)
    return BabiTask(tokenizer, haystack, read_stories(path), fewest_facts=config.num_facts[0])


def task_text(config: RecallConfig, kind: str) -> str:
    """Return all sentences of a text task's training episodes, one per line, to train a tokenizer of the given kind.

    Raises:
        InputError: The stories are missing or malformed.
    """
    sentences = PASSKEY_SENTENCES if config.path is None else story_sentences(read_stories(config.path))
    return "\n".join(spell(sentence, kind) for sentence in sentences)


class RecallStream(RolloutStream):
    """A stream of rollouts with recall episodes: a pure function of seed, position, curriculum level and mined decoys.

    All rows of a rollout have the same number of timesteps. An episode longer than `rollout_length` is cut: the memory
    is carried across the cut, the gradient is not.

    Args:
        task: Generator of facts, filler and questions.
        config: Layout of the episodes.
        num_lanes: Number of rows B.
        segment_length: Tokens S of a segment.
        rollout_length: Maximum number of timesteps of a rollout.
        bos_token_id: Token that the first timestep reads.
        seed: Seed of all episodes.

    Raises:
        InputError: A segment cannot hold the facts or the question, or the task has no decoys, but the config has a
            probability of them.
    """

    def __init__(
        self,
        task: RecallTask,
        config: RecallConfig,
        *,
        num_lanes: Integer,
        segment_length: Integer,
        rollout_length: Integer,
        bos_token_id: Integer,
        seed: Integer,
    ) -> None:
        self.task = task
        self.config = config
        self.num_lanes = check_integer("num_lanes", num_lanes, 1)
        self.segment_length = check_integer("segment_length", segment_length, 1)
        self.rollout_length = check_integer("rollout_length", rollout_length, 1)
        self.bos_token_id = check_integer("bos_token_id", bos_token_id, 0)
        self.seed = check_seed("seed", seed)
        self.level = 0
        self._recent_losses: list[float] = []
        self._episode = 0
        self._first_episode_of_level = 0
        self._timestep = 0
        # Positions in the documents.
        self._mined_decoys: list[int] = []
        self._whole: Rollout | None = None
        check_segment_length(task, config, self.segment_length)
        if config.decoy_probability:
            task.make_decoy(np.random.Generator(np.random.PCG64(0)), 1)  # raises here rather than in training

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
        """Maximum number of facts of an episode at the current level."""
        fewest, most = self.config.num_facts
        curriculum = self.config.curriculum
        return most if curriculum is None else min(most, max(fewest, curriculum.start_facts + self.level))

    @property
    def max_distance(self) -> int:
        """Maximum distance at the current level, in segments."""
        curriculum = self.config.curriculum
        longest = self.config.max_distance
        # Avoids computing 2**level for large levels.
        if curriculum is None or self.level >= longest.bit_length():
            return longest
        return min(longest, curriculum.start_distance << self.level)

    @property
    def is_hardest(self) -> bool:
        """Whether the curriculum is complete; True without a curriculum."""
        return (self.most_facts, self.max_distance) == (self.config.num_facts[1], self.config.max_distance)

    def observe(self, loss: float, *, is_written: Callable[[Tensor], Tensor] | None = None) -> None:
        """Advance the curriculum if the mean loss is low; after its end, find decoys if the config wants it.

        Args:
            loss: Loss of the update, in nats per answer token.
            is_written: As in `RolloutStream`; must be given to find decoys.
        """
        is_known = self.is_hardest and self._share_of_known_filler() >= 1
        # An episode that is cut has the decoys that were known at its start.
        if self.config.mine_decoys and is_known and self._whole is None:
            assert is_written is not None
            self._mine_decoys(is_written)
        curriculum = self.config.curriculum
        if curriculum is None or self.is_hardest:
            return
        self._recent_losses = [*self._recent_losses, loss][-curriculum.window :]
        if len(self._recent_losses) == curriculum.window and np.mean(self._recent_losses) < curriculum.advance_below:
            self.level += 1
            self._recent_losses = []
            self._whole, self._timestep = None, 0
            self._episode += 1
            self._first_episode_of_level = self._episode

    def _share_of_known_filler(self) -> float:
        return (self._episode - self._first_episode_of_level) / _EPISODES_UNTIL_FILLER_IS_KNOWN

    def _mine_decoys(self, is_written: Callable[[Tensor], Tensor]) -> None:
        assert isinstance(self.task, TextTask)
        generator = np.random.Generator(np.random.PCG64([self.seed, self._episode, _SEGMENTS_TO_MINE]))
        starts = generator.integers(self.task.num_document_tokens, size=_SEGMENTS_TO_MINE)
        segments = np.stack([self.task.read(start, self.segment_length) for start in starts.tolist()])
        found = starts[is_written(torch.from_numpy(segments)).cpu().numpy()].tolist()
        self._mined_decoys = [*self._mined_decoys, *found][-_MOST_MINED:]

    def _make_decoy(self, generator: np.random.Generator) -> Tokens:
        if self._mined_decoys and generator.random() < 0.5:
            assert isinstance(self.task, TextTask)
            start = self._mined_decoys[int(generator.integers(len(self._mined_decoys)))]
            shift = int(generator.integers(self.segment_length)) - self.segment_length // 2
            return self.task.read((start + shift) % self.task.num_document_tokens, self.segment_length)
        return self.task.make_decoy(generator, self.segment_length)

    def _make_episodes(self) -> Rollout:
        generator = np.random.Generator(np.random.PCG64([self.seed, self._episode]))
        fewest, most = self.config.num_facts[0], self.most_facts
        num_facts = int(generator.integers(min(fewest, most), most + 1))
        if not self.is_hardest and generator.random() < 0.5:
            num_facts = most
        horizon = int(np.exp(generator.uniform(0, np.log(self.max_distance + 1))))
        episodes = [self.task.make_episode(generator, num_facts) for _ in range(self.num_lanes)]
        # Stories may have no question with exactly this number of facts.
        num_facts = max(len(episode.facts) for episode in episodes)
        facts_per_segment = _draw_log_uniform(generator, *self.config.facts_per_segment)
        fact_timesteps = draw_fact_timesteps(self.config, generator, num_facts, facts_per_segment=facts_per_segment)
        first_question = fact_timesteps[-1] + 1
        num_timesteps = first_question + horizon
        shape = num_timesteps, self.num_lanes
        has_question = generator.random(shape) < self.config.question_probability
        has_question[:first_question] = False
        has_question[-1] = True
        inputs = insert_facts(self.task, episodes, fact_timesteps, range(num_timesteps), self.segment_length, generator)
        if self.config.decoy_probability:
            is_decoy = generator.random(shape) < self.config.decoy_probability
            is_decoy[fact_timesteps] = False
            for timestep, row in np.argwhere(is_decoy):
                inputs[timestep, row] = self._make_decoy(generator)
        answers = [np.empty(0, np.int64)] * has_question.size
        for timestep, row in np.argwhere(has_question):
            questions = episodes[row].questions
            question = questions[int(generator.integers(len(questions)))]
            append_question(inputs[timestep, row], question)
            answers[timestep * self.num_lanes + row] = question.answer
        targets, padding = pad_answers(answers, self.task.answer_length)
        targets, padding = targets.reshape(*shape, -1), padding.reshape(*shape, -1)
        rollout = with_first_timestep(inputs, targets, target_padding=padding, bos_token_id=self.bos_token_id)
        is_filler = None
        if self.is_hardest:
            is_filler = torch.from_numpy(generator.random(rollout.inputs.shape[:2]) < self._share_of_known_filler())
            is_filler[1:][fact_timesteps] = False  # not the first timestep, which reads no text
        return dataclasses.replace(rollout, targets_are_answers=True, is_filler=is_filler)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "segment_length": self.segment_length,
            _FINGERPRINT: self.task.fingerprint,
        }

    def state(self) -> dict[str, Any]:
        """Return the cursor, the state of the curriculum and the mined decoys as JSON values."""
        return {
            **self._identity(),
            "episode": self._episode,
            "timestep": self._timestep,
            "level": self.level,
            "recent_losses": list(self._recent_losses),
            "first_episode_of_level": self._first_episode_of_level,
            "mined_decoys": list(self._mined_decoys),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a cursor that `state` returned.

        Raises:
            CheckpointError: The cursor belongs to another stream or is damaged; this stream's position is unchanged.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected and (name != _FINGERPRINT or name in state):
                raise CheckpointError(f"the data cursor has {name} {state.get(name)!r}; this stream has {expected!r}")
        counts = [state.get(name) for name in ("episode", "timestep", "level")]
        counts.append(state.get("first_episode_of_level", counts[0]))  # missing in the cursors of version 0.1
        losses, mined = state.get("recent_losses"), state.get("mined_decoys", [])
        if not all(type(count) is int and count >= 0 for count in counts):
            raise CheckpointError(
                f"the data cursor has episode, timestep, level, first episode of the level {counts}; they must be "
                "non-negative integers"
            )
        if not isinstance(losses, list) or not all(isinstance(loss, float) for loss in losses):
            raise CheckpointError(f"the data cursor has recent_losses {losses!r}; it must be a list of numbers")
        if not isinstance(mined, list) or not all(type(start) is int and start >= 0 for start in mined):
            raise CheckpointError(
                f"the data cursor has mined_decoys {mined!r}; it must be a list of non-negative integers"
            )
        resumed = copy.copy(self)
        resumed._episode, resumed._timestep, resumed.level, resumed._first_episode_of_level = (
            int(count or 0) for count in counts
        )
        resumed._recent_losses, resumed._mined_decoys = losses, mined
        resumed._whole = resumed._make_episodes() if resumed._timestep else None
        if resumed._whole is not None and resumed._timestep >= resumed._whole.num_timesteps:
            raise CheckpointError(
                f"the data cursor has timestep {counts[1]}; episode {counts[0]} has "
                f"{resumed._whole.num_timesteps} timesteps"
            )
        vars(self).update(vars(resumed))


def _draw_log_uniform(generator: np.random.Generator, fewest: int, most: int) -> int:
    return int(np.exp(generator.uniform(np.log(fewest), np.log(most + 1)))) if fewest < most else most


def check_segment_length(task: RecallTask, config: RecallConfig, segment_length: int) -> None:
    """Check that a segment can hold the task's facts and its question.

    Raises:
        InputError: `segment_length` is too small.
    """
    num_facts = min(config.facts_per_segment[1], config.num_facts[1])
    longest = max(task.question_length, num_facts * task.fact_length)
    if longest > segment_length:
        raise InputError(
            f"model.segment_length ({segment_length}) must be at least {longest}: a segment holds "
            f"{counted(num_facts, 'fact')} (data.recall.facts_per_segment) of up to {task.fact_length} tokens, or ends "
            f"with a question of up to {task.question_length} tokens"
        )


def draw_fact_timesteps(
    config: RecallConfig, generator: np.random.Generator, num_facts: int, *, facts_per_segment: int
) -> list[int]:
    """Return the timesteps at which facts are inserted, `facts_per_segment` in each, with random gaps between."""
    num_segments = -(-num_facts // facts_per_segment)
    gaps = generator.integers(config.max_fact_gap + 1, size=num_segments - 1)
    return [0, *(int(timestep) for timestep in np.cumsum(gaps + 1))]


def insert_facts(
    task: RecallTask,
    episodes: Sequence[Episode],
    timesteps: Sequence[int],
    window: range,
    segment_length: int,
    generator: np.random.Generator,
) -> Tokens:
    """Return the `window` of timesteps, (timesteps, rows, tokens): filler, with each row's facts at `timesteps`."""
    shape = len(episodes), len(window), segment_length
    inputs = np.stack([task.make_filler(generator, shape[1] * shape[2]) for _ in episodes]).reshape(shape)
    for row, episode in zip(inputs, episodes, strict=True):
        num_facts = -(-len(episode.facts) // len(timesteps))
        for index, timestep in enumerate(timesteps):
            facts = episode.facts[index * num_facts : (index + 1) * num_facts]
            if facts and timestep in window:
                write_at(row[timestep - window.start], facts, generator)
    return inputs.swapaxes(0, 1)


def append_question(segment: NDArray[Any], question: Question) -> None:
    """Overwrite the end of a segment with a question, in place."""
    segment[len(segment) - len(question.tokens) :] = question.tokens


def with_first_timestep(
    inputs: Tokens, targets: Tokens, *, target_padding: NDArray[np.bool_], bos_token_id: int
) -> Rollout:
    """Return a rollout with a prepended first timestep that reads the beginning-of-sequence token."""

    def prepend(first: Any, rest: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.full_like(rest[:1], first), rest]))

    bos = np.zeros_like(inputs, np.bool_)
    rollout_inputs, input_padding = prepend(PADDING_TOKEN_ID, inputs), prepend(True, bos)
    rollout_inputs[0, :, 0] = bos_token_id
    input_padding[0, :, 0] = False
    reset = torch.zeros(rollout_inputs.shape[:2], dtype=torch.bool, device="cpu")
    reset[0] = True
    return Rollout(
        inputs=rollout_inputs,
        targets=prepend(PADDING_TOKEN_ID, targets),
        reset=reset,
        input_padding=input_padding,
        target_padding=prepend(True, target_padding),
    )
