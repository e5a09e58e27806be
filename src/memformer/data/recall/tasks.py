"""Recall tasks: episodes of facts to remember, filler to sit through, and questions about the facts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.tokenizer_training import word_tokenizer
from memformer.data.tokenizers import Tokenizer

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """What a segment ends with, and the tokens that must follow.

    Attributes:
        tokens: The question.
        answer: What comes next, at most `answer_length` tokens of the task.
    """

    tokens: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Episode:
    """One thing to remember and to be asked about.

    Attributes:
        facts: In the order in which they are told; each stands whole in one segment.
        questions: Any of them may be asked, any number of times, once all facts are told.
    """

    facts: list[Tokens]
    questions: list[Question]


class RecallTask(ABC):
    """Makes episodes and the filler between; everything is drawn from the generator that is handed in.

    Args:
        tokenizer: What the ids mean.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def fact_length(self) -> int:
        """Tokens of the longest fact."""

    @property
    @abstractmethod
    def answer_length(self) -> int:
        """Tokens of the longest answer."""

    @property
    @abstractmethod
    def question_length(self) -> int:
        """Tokens of the longest question."""

    @abstractmethod
    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return an episode of `num_facts` facts."""

    @abstractmethod
    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return so many tokens that say nothing about any fact."""


class _SymbolTask(RecallTask):
    """A task on words that mean nothing: values, keys, filler and the word that asks."""

    def __init__(self, *, num_keys: int, num_values: int, num_fillers: int) -> None:
        words = [f"value{index}" for index in range(num_values)]
        words += [f"key{index}" for index in range(num_keys)]
        words += [f"filler{index}" for index in range(num_fillers)]
        super().__init__(word_tokenizer([*words, "?"]))
        first_word = self.tokenizer.vocab_size - len(words) - 1
        self._values = first_word + np.arange(num_values)
        self._keys = self._values[-1] + 1 + np.arange(num_keys)
        self._fillers = self._keys[-1] + 1 + np.arange(num_fillers)
        self._ask = int(self._fillers[-1]) + 1

    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return random filler words."""
        return self._fillers[generator.integers(len(self._fillers), size=num_tokens)]


class PairTask(_SymbolTask):
    """Associative retrieval: a fact is a key and its value, a question is a key.

    With one key it is the task of remembering one fact. ARMT (arXiv 2407.04841) calls it "remember" with unique keys
    and "rewrite" where the last value of a key wins; with several pairs a segment it is MQAR (arXiv 2312.04927).

    Args:
        rewrite: Keys may come again, and the last value wins; otherwise they are unique.
        num_keys: Keys there are.
        num_values: Values there are.
        num_fillers: Filler words there are.
    """

    fact_length = 2
    question_length = 2
    answer_length = 1

    def __init__(self, *, rewrite: bool, num_keys: int, num_values: int, num_fillers: int) -> None:
        super().__init__(num_keys=num_keys, num_values=num_values, num_fillers=num_fillers)
        self.rewrite = rewrite

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return pairs, and a question about each key among them."""
        if self.rewrite:
            keys = self._keys[generator.integers(len(self._keys), size=num_facts)]
        else:
            keys = generator.permutation(self._keys)[:num_facts]
        values = self._values[generator.integers(len(self._values), size=num_facts)]
        pairs = np.stack([keys, values], axis=1)
        latest = dict(pairs.tolist())
        questions = [Question(np.array([self._ask, key]), np.array([value])) for key, value in latest.items()]
        return Episode(list(pairs), questions)


class CopyTask(_SymbolTask):
    """Copy: the facts are values, and the answer is all of them in order.

    Args:
        most_facts: Values of the longest episode.
        num_values: Values there are.
        num_fillers: Filler words there are.
    """

    fact_length = 1
    question_length = 1

    def __init__(self, *, most_facts: int, num_values: int, num_fillers: int) -> None:
        super().__init__(num_keys=1, num_values=num_values, num_fillers=num_fillers)
        self.most_facts = most_facts

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        return self.most_facts

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return values, and the one question for all of them."""
        values = self._values[generator.integers(len(self._values), size=num_facts)]
        return Episode(list(values[:, None]), [Question(np.array([self._ask]), values)])


def pad_answers(answers: Sequence[Tokens], length: int) -> tuple[Tokens, NDArray[np.bool_]]:
    """Return answers side by side, (answers, length), and True where there is no answer token."""
    padded = np.zeros((len(answers), length), np.int64)
    padding = np.ones((len(answers), length), np.bool_)
    for row, answer in enumerate(answers):
        padded[row, : len(answer)] = answer
        padding[row, : len(answer)] = False
    return padded, padding


def place(segment: NDArray[Any], facts: Sequence[Tokens], generator: np.random.Generator) -> None:
    """Put facts, one after another, at a random place of a segment, over its filler."""
    told = np.concatenate(facts)
    start = int(generator.integers(len(segment) - len(told) + 1))
    segment[start : start + len(told)] = told
