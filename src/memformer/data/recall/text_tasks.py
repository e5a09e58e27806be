"""Recall tasks in real text: facts hidden in documents, and questions about them in plain words.

Text is told as it is written, with a blank before each sentence. A tokenizer of kind word splits at white space only,
so for it every digit, full stop, question mark and comma is spelled as a word of its own: "bathroom." is then the word
"bathroom", and a pass key is five words whatever its number. What is told, asked and answered is tokenized apart, so
that an answer has the same tokens in a fact and after its question.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memformer.data.corpus import Corpus
from memformer.data.files import locate_files, open_source
from memformer.data.recall.tasks import Episode, Question, RecallTask, Tokens
from memformer.data.tokenizers import TextTokenizer, Tokenizer
from memformer.errors import InputError

_PASSKEY_DIGITS = 5
_PASSKEY_FACT = " The pass key is", ". Remember it."
_PASSKEY_QUESTION = " What is the pass key? The pass key is"
# All that the task can say.
PASSKEY_SENTENCES = [" 0123456789".join(_PASSKEY_FACT), _PASSKEY_QUESTION]


@dataclass(frozen=True)
class StoryQuestion:
    """A question about the first statements of a story.

    Attributes:
        num_statements: Statements told before it.
        text: The question.
        answer: The answer; one that lists several things is still one answer.
    """

    num_statements: int
    text: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A story of bAbI (arXiv 1502.05698).

    Attributes:
        statements: In the order in which they are told.
        questions: Those asked on the way.
    """

    statements: list[str]
    questions: list[StoryQuestion]


def read_stories(path: str | list[str]) -> list[Story]:
    """Return the stories in files of bAbI.

    A line is `ID text` or `ID question<TAB>answer<TAB>supporting IDs`, and the ID 1 begins a story. Supporting IDs
    are not read.

    Args:
        path: A file, a folder, a glob pattern, or a list of these; files ending in .gz or .xz are uncompressed.

    Raises:
        InputError: A file is missing, cannot be read, has a line of another form, or asks nothing.
    """
    stories: list[Story] = []
    for file, _ in locate_files(path):
        with open_source(file) as stream:
            content = stream.read()
        try:
            lines = content.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 at byte offset {error.start}; stories are text") from error
        found = _parse_stories(lines, file)
        if not any(story.questions for story in found):
            raise InputError(f"{file} holds no question; stories need at least one")
        stories += found
    return stories


def _parse_stories(lines: Iterable[str], file: Path) -> list[Story]:
    stories: list[Story] = []
    last_id = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        first_word, _, rest = line.partition(" ")
        if first_word == "1":
            stories.append(Story([], []))
        elif not stories or first_word != str(last_id + 1):
            raise InputError(
                f"{name} begins with {first_word!r}; a line begins with its ID: 1 for the first of a story, else one "
                "more than the line before"
            )
        last_id = int(first_word)
        story = stories[-1]
        text, *fields = (field.strip() for field in rest.split("\t"))
        if not fields and text and not text.endswith("?"):
            story.statements.append(text)
        elif not fields or not text or not fields[0]:
            raise InputError(
                f"{name} must be 'ID text' or 'ID question<TAB>answer<TAB>supporting IDs', and no part empty"
            )
        elif not story.statements:
            raise InputError(f"{name} asks before its story has told anything")
        else:
            story.questions.append(StoryQuestion(len(story.statements), text, fields[0]))
    return stories


def story_sentences(stories: Iterable[Story]) -> Iterator[str]:
    """Yield every statement, question and answer once, as it is told."""
    for story in stories:
        for sentence in story.statements:
            yield f" {sentence}"
        for question in story.questions:
            yield from (f" {question.text}", f" {question.answer}")


def spell(text: str, kind: str) -> str:
    """Return the text as a tokenizer of a kind should read it; see above."""
    return re.sub(r"([.?,\d])", r" \1 ", text) if kind == "word" else text


class _TextTask(RecallTask):
    """A task whose filler is documents.

    Args:
        tokenizer: What the ids mean.
        haystack: The documents.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Corpus) -> None:
        super().__init__(tokenizer)
        self._haystack = haystack
        self._ends = haystack.document_lengths.cumsum()

    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return what stands at a random place of the documents; where one ends, the next one follows."""
        start = int(generator.integers(self._ends[-1]))
        index = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - int(self._ends[index] - self._haystack.document_lengths[index])
        parts = []
        while num_tokens:
            part = self._haystack.document(index)[offset : offset + num_tokens]
            parts.append(part)
            num_tokens -= len(part)
            index, offset = (index + 1) % self._haystack.num_documents, 0
        return np.concatenate(parts).astype(np.int64)

    def _encode(self, text: str) -> Tokens:
        """Return the ids of a part of what is told, asked or answered.

        Raises:
            InputError: The tokenizer lacks a word.
        """
        text = spell(text, self.tokenizer.kind)
        if isinstance(self.tokenizer, TextTokenizer) and self.tokenizer.kind == "word":
            for word in text.split():
                if self.tokenizer.tokenizer.token_to_id(word) is None:
                    raise InputError(
                        f"the recall task has the word {word!r}, which the run's tokenizer lacks; its words come from "
                        "data.train and, for the task babi, recall.path"
                    )
        return self.tokenizer.encode(text.encode(), name="recall task").astype(np.int64)


class PasskeyTask(_TextTask):
    """One pass key hidden in documents: "The pass key is 71432. Remember it." (arXiv 2305.16300).

    Args:
        tokenizer: What the ids mean.
        haystack: The documents.

    Raises:
        InputError: The tokenizer lacks a word.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Corpus) -> None:
        super().__init__(tokenizer, haystack)
        self._before, self._after = map(self._encode, _PASSKEY_FACT)
        self._question = self._encode(_PASSKEY_QUESTION)

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        # A blank and the digits are that many bytes, and a subword has at least one; words have no blank.
        return _PASSKEY_DIGITS + (self.tokenizer.kind != "word")

    @property
    def fact_length(self) -> int:
        """Tokens of the longest fact."""
        return len(self._before) + self.answer_length + len(self._after)

    @property
    def question_length(self) -> int:
        """Tokens of the question."""
        return len(self._question)

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return a pass key and the question for it; `num_facts` is always 1."""
        number = generator.integers(10 ** (_PASSKEY_DIGITS - 1), 10**_PASSKEY_DIGITS)
        answer = self._encode(f" {number}")
        return Episode([np.concatenate([self._before, answer, self._after])], [Question(self._question, answer)])


class BabiTask(_TextTask):
    """Stories of bAbI scattered in documents, in the manner of BABILong (arXiv 2406.10149).

    A fact is a statement. An episode tells the statements before one question, in order, and asks that question.

    Args:
        tokenizer: What the ids mean.
        haystack: The documents.
        stories: What is told.
        fewest_facts: Facts of the shortest episode that will be asked for.

    Raises:
        InputError: The tokenizer lacks a word, or no question has so few statements.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Corpus, stories: Iterable[Story], *, fewest_facts: int) -> None:
        super().__init__(tokenizer, haystack)
        # The same few sentences come again and again.
        encode = functools.cache(self._encode)
        self._questions: dict[int, list[tuple[list[Tokens], Question]]] = {}
        for story in stories:
            facts = [encode(f" {statement}") for statement in story.statements]
            for question in story.questions:
                asked = Question(encode(f" {question.text}"), encode(f" {question.answer}"))
                self._questions.setdefault(question.num_statements, []).append((facts, asked))
        self._most_available(fewest_facts)

    @functools.cached_property
    def fact_length(self) -> int:
        """Tokens of the longest fact."""
        return max(len(fact) for questions in self._questions.values() for facts, _ in questions for fact in facts)

    @functools.cached_property
    def question_length(self) -> int:
        """Tokens of the longest question."""
        return max(len(asked.tokens) for questions in self._questions.values() for _, asked in questions)

    @functools.cached_property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        return max(len(asked.answer) for questions in self._questions.values() for _, asked in questions)

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return a question and the statements before it: as many as questions have, at most `num_facts`.

        Raises:
            InputError: No question has so few.
        """
        count = self._most_available(num_facts)
        questions = self._questions[count]
        facts, asked = questions[int(generator.integers(len(questions)))]
        return Episode(facts[:count], [asked])

    def _most_available(self, num_facts: int) -> int:
        counts = [count for count in self._questions if count <= num_facts]
        if not counts:
            raise InputError(
                f"recall.num_facts asks for {num_facts}; the shortest question of the stories has "
                f"{min(self._questions)} statements before it"
            )
        return max(counts)
