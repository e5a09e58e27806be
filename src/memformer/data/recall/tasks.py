"""Recall tasks: episodes of facts to remember, filler, and questions about the facts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizer_training import word_tokenizer
from memformer.data.tokenizers import Tokenizer
from memformer.errors import InputError

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """A question at the end of a segment, and its answer.

    Attributes:
        tokens: The question.
        answer: The tokens that must follow the question; at most the task's `answer_length`.
    """

    tokens: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Episode:
    """Facts to remember, and the questions about them.

    Attributes:
        facts: In order of insertion; each fact stays within one segment.
        questions: Once all facts are inserted, any of these may be appended, any number of times.
    """

    facts: list[Tokens]
    questions: list[Question]


class RecallTask(ABC):
    """Abstract generator of episodes and filler; all randomness comes from the generator that is passed in.

    Args:
        tokenizer: Tokenizer of the task's token ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits of what the episodes are made from: here, the tokenizer."""
        return self.tokenizer.fingerprint

    @property
    @abstractmethod
    def fact_length(self) -> int:
        """Number of tokens of the longest fact."""

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Number of tokens of the longest answer."""

    @property
    @abstractmethod
    def question_length(self) -> int:
        """Number of tokens of the longest question."""

    @abstractmethod
    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return an episode with `num_facts` facts."""

    @abstractmethod
    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return `num_tokens` tokens that contain no information about any fact."""

    def make_decoy(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return filler that resembles a fact.

        Raises:
            InputError: The task has no such filler.
        """
        raise InputError("data.recall.decoy_probability: the task has no filler that resembles a fact")


class _SymbolTask(RecallTask):
    """A task with a vocabulary of abstract words: values, keys, filler and a question mark."""

    def __init__(self, *, num_keys: int, num_values: int, num_fillers: int) -> None:
        words = [f"value{index}" for index in range(num_values)]
        words += [f"key{index}" for index in range(num_keys)]
        words += [f"filler{index}" for index in range(num_fillers)]
        super().__init__(word_tokenizer([*words, "?"]))
        first_word = self.tokenizer.vocab_size - len(words) - 1
        self._values = first_word + np.arange(num_values)
        self._keys = self._values[-1] + 1 + np.arange(num_keys)
        self._fillers = self._keys[-1] + 1 + np.arange(num_fillers)
        self._question_mark = int(self._fillers[-1]) + 1

    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return random filler words."""
        return self._fillers[generator.integers(len(self._fillers), size=num_tokens)]


class PairTask(_SymbolTask):
    """Associative retrieval: a fact is a key and its value, a question is a key.

    With a single key the task is to remember one fact. ARMT (arXiv 2407.04841) calls the task "remember" with unique
    keys, and "rewrite" if the last value of a repeated key counts; with several pairs per segment it is MQAR (arXiv
    2312.04927).

    Args:
        rewrite: Whether keys may repeat, in which case the last value counts; otherwise they are unique.
        num_keys: Number of different keys.
        num_values: Number of different values.
        num_fillers: Number of different filler words.
    """

    fact_length = 2
    question_length = 2
    answer_length = 1

    def __init__(self, *, rewrite: bool, num_keys: int, num_values: int, num_fillers: int) -> None:
        super().__init__(num_keys=num_keys, num_values=num_values, num_fillers=num_fillers)
        self.rewrite = rewrite

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return key-value pairs, and one question about each key."""
        if self.rewrite:
            keys = self._keys[generator.integers(len(self._keys), size=num_facts)]
        else:
            keys = generator.permutation(self._keys)[:num_facts]
        values = self._values[generator.integers(len(self._values), size=num_facts)]
        pairs = np.stack([keys, values], axis=1)
        latest = dict(pairs.tolist())
        questions = [Question(np.array([self._question_mark, key]), np.array([value])) for key, value in latest.items()]
        return Episode(list(pairs), questions)


class CopyTask(_SymbolTask):
    """Copying: the facts are values, and the answer is all of them in order.

    Args:
        most_facts: Number of values of the longest episode.
        num_values: Number of different values.
        num_fillers: Number of different filler words.
    """

    fact_length = 1
    question_length = 1

    def __init__(self, *, most_facts: int, num_values: int, num_fillers: int) -> None:
        super().__init__(num_keys=1, num_values=num_values, num_fillers=num_fillers)
        self.most_facts = most_facts

    @property
    def answer_length(self) -> int:
        """Number of tokens of the longest answer."""
        return self.most_facts

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return values, and one question whose answer is all of them."""
        values = self._values[generator.integers(len(self._values), size=num_facts)]
        return Episode(list(values[:, None]), [Question(np.array([self._question_mark]), values)])


def pad_answers(answers: Sequence[Tokens], length: int) -> tuple[Tokens, NDArray[np.bool_]]:
    """Return the answers padded to one array, (answers, length), and its padding mask, True at padding."""
    padded = np.zeros((len(answers), length), np.int64)
    padding = np.ones((len(answers), length), np.bool_)
    for row, answer in enumerate(answers):
        padded[row, : len(answer)] = answer
        padding[row, : len(answer)] = False
    return padded, padding


def write_at(segment: NDArray[Any], facts: Sequence[Tokens], generator: np.random.Generator) -> None:
    """Write consecutive facts over the filler at a random position of a segment, in place."""
    tokens = np.concatenate(facts)
    start = int(generator.integers(len(segment) - len(tokens) + 1))
    segment[start : start + len(tokens)] = tokens
