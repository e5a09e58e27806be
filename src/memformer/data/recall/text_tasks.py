"""Recall tasks in real text: facts hidden in documents, and questions about them in plain English.

Sentences are inserted verbatim, with a space before each. A tokenizer of kind word splits at white space only, so for
it every digit, full stop, question mark and comma becomes a separate word: "bathroom." contains the word "bathroom",
and every pass key is five words. Facts, questions and answers are tokenized separately, so that an answer has the same
tokens in a fact and after its question.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memformer.data.content import open_text
from memformer.data.corpus import Corpus
from memformer.data.files import locate_files
from memformer.data.recall.tasks import Episode, Question, RecallTask, Tokens
from memformer.data.tokenizers import TextTokenizer, Tokenizer, fingerprint_of
from memformer.errors import InputError

_PASSKEY_DIGITS = 5
_PASSKEY_FACT = " The pass key is", ". Remember it."
_PASSKEY_QUESTION = " What is the pass key? The pass key is"
# All sentences of the task.
PASSKEY_SENTENCES = [" 0123456789".join(_PASSKEY_FACT), _PASSKEY_QUESTION]


@dataclass(frozen=True)
class StoryQuestion:
    """A question about the statements of a story that precede it.

    Attributes:
        num_statements: Number of statements before the question.
        text: The question.
        answer: The answer; a list of several things is still one answer.
    """

    num_statements: int
    text: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A story of bAbI (arXiv 1502.05698).

    Attributes:
        statements: The statements in order.
        questions: The questions between the statements, in order.
    """

    statements: list[str]
    questions: list[StoryQuestion]


def read_stories(path: str | list[str]) -> list[Story]:
    """Return the stories in bAbI files.

    A line is `ID text` or `ID question<TAB>answer<TAB>supporting IDs`, and the ID 1 begins a story. Supporting IDs are
    ignored.

    Args:
        path: A file, a folder, a glob pattern, or a list of these; compressed files are decompressed.

    Raises:
        InputError: A file is missing, cannot be read, has a malformed line, or contains no question.
    """
    stories: list[Story] = []
    for file, _ in locate_files(path):
        with open_text(file) as stream:
            lines = stream.read().decode("utf-8").split("\n")
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
                f"{name} begins with {first_word!r}; a line must begin with its ID: 1 for the first line of a story, "
                "otherwise the previous line's ID plus 1"
            )
        last_id = int(first_word)
        story = stories[-1]
        text, *fields = (field.strip() for field in rest.split("\t"))
        if not fields and text and not text.endswith("?"):
            story.statements.append(text)
        elif not fields or not text or not fields[0]:
            raise InputError(
                f"{name} must be 'ID text' or 'ID question<TAB>answer<TAB>supporting IDs', with no empty part"
            )
        elif not story.statements:
            raise InputError(f"{name} is a question before the first statement of its story")
        else:
            story.questions.append(StoryQuestion(len(story.statements), text, fields[0]))
    return stories


def story_sentences(stories: Iterable[Story]) -> Iterator[str]:
    """Yield every statement, question and answer, with a space before each."""
    for story in stories:
        for sentence in story.statements:
            yield f" {sentence}"
        for question in story.questions:
            yield from (f" {question.text}", f" {question.answer}")


def spell(text: str, kind: str) -> str:
    """Return the text with spaces around digits and punctuation for kind word, unchanged for other kinds."""
    return re.sub(r"([.?,\d])", r" \1 ", text) if kind == "word" else text


class TextTask(RecallTask):
    """A task whose filler comes from documents.

    Args:
        tokenizer: Tokenizer of the documents, the facts and the questions.
        haystack: The documents.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Corpus) -> None:
        super().__init__(tokenizer)
        self._haystack = haystack
        self._ends = haystack.document_lengths.cumsum()

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits of what the episodes are made from: tokenizer and documents."""
        return fingerprint_of([self.tokenizer.fingerprint, self._haystack.fingerprint])

    def make_filler(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return consecutive tokens from a random position in the documents; the next document follows each end."""
        return self.read(int(generator.integers(self.num_document_tokens)), num_tokens)

    @property
    def num_document_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self._ends[-1])

    def read(self, start: int, num_tokens: int) -> Tokens:
        """Return consecutive tokens from a position in the documents, counted from the first document's start.

        The next document follows each end, and the first one the last.
        """
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
        """Return the token ids of a fact, a question, an answer or a part of these.

        Raises:
            InputError: The tokenizer lacks a word.
        """
        text = spell(text, self.tokenizer.kind)
        if isinstance(self.tokenizer, TextTokenizer) and self.tokenizer.kind == "word":
            for word in text.split():
                if self.tokenizer.tokenizer.token_to_id(word) is None:
                    raise InputError(
                        f"the recall task contains the word {word!r}, which the run's tokenizer lacks; the tokenizer's "
                        "words come from data.train and, for the task babi, data.recall.path"
                    )
        return self.tokenizer.encode(text.encode(), name="recall task").astype(np.int64)


class PasskeyTask(TextTask):
    """A task with one pass key hidden in documents: "The pass key is 71432. Remember it." (arXiv 2305.16300).

    Args:
        tokenizer: Tokenizer of the documents, the facts and the questions.
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
        """Number of tokens of the longest answer."""
        # A space and the digits are this many bytes, and a subword has at least one byte; words have no space.
        return _PASSKEY_DIGITS + (self.tokenizer.kind != "word")

    @property
    def fact_length(self) -> int:
        """Number of tokens of the longest fact."""
        return len(self._before) + self.answer_length + len(self._after)

    @property
    def question_length(self) -> int:
        """Number of tokens of the question."""
        return len(self._question)

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return a random pass key and its question; `num_facts` is always 1."""
        number = generator.integers(10 ** (_PASSKEY_DIGITS - 1), 10**_PASSKEY_DIGITS)
        answer = self._encode(f" {number}")
        return Episode([np.concatenate([self._before, answer, self._after])], [Question(self._question, answer)])


class BabiTask(TextTask):
    """A task with stories of bAbI scattered in documents, as in BABILong (arXiv 2406.10149).

    A fact is a statement. An episode inserts the statements before one question, in order, and appends that question.

    Args:
        tokenizer: Tokenizer of the documents, the facts and the questions.
        haystack: The documents.
        stories: The stories.
        fewest_facts: Smallest `num_facts` that `make_episode` will receive.

    Raises:
        InputError: The tokenizer lacks a word, or every question has more than `fewest_facts` statements before it.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Corpus, stories: Iterable[Story], *, fewest_facts: int) -> None:
        super().__init__(tokenizer, haystack)
        stories = list(stories)
        self._stories_fingerprint = fingerprint_of(repr(stories))
        # The stories repeat a small number of sentences.
        encode = functools.cache(self._encode)
        self._content_words = [encode(f" {word}") for word in sorted(_content_words(stories))]
        self._questions: dict[int, list[tuple[list[Tokens], Question]]] = {}
        for story in stories:
            facts = [encode(f" {statement}") for statement in story.statements]
            for question in story.questions:
                encoded = Question(encode(f" {question.text}"), encode(f" {question.answer}"))
                self._questions.setdefault(question.num_statements, []).append((facts, encoded))
        self._most_available(fewest_facts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits of what the episodes are made from: tokenizer, documents and stories."""
        return fingerprint_of([super().fingerprint, self._stories_fingerprint])

    @functools.cached_property
    def fact_length(self) -> int:
        """Number of tokens of the longest fact."""
        return max(len(fact) for questions in self._questions.values() for facts, _ in questions for fact in facts)

    @functools.cached_property
    def question_length(self) -> int:
        """Number of tokens of the longest question."""
        return max(len(question.tokens) for questions in self._questions.values() for _, question in questions)

    @functools.cached_property
    def answer_length(self) -> int:
        """Number of tokens of the longest answer."""
        return max(len(question.answer) for questions in self._questions.values() for _, question in questions)

    def make_episode(self, generator: np.random.Generator, num_facts: int) -> Episode:
        """Return a random question and the statements before it: as many as possible, at most `num_facts`.

        Raises:
            InputError: Every question has more than `num_facts` statements before it.
        """
        count = self._most_available(num_facts)
        questions = self._questions[count]
        facts, question = questions[int(generator.integers(len(questions)))]
        return Episode(facts[:count], [question])

    def make_decoy(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return a passage of the documents with a content word, or, equally likely, the halves of two of them.

        Content words are the answers and the words by which questions differ, such as names. Two passages bring a name
        and an answer together, which is rare in the documents and resembles a fact most.

        Raises:
            InputError: No document contains a content word.
        """
        if not self._places_of_words:
            raise InputError("data.recall.decoy_probability: no document contains an answer or a name of the task")
        if num_tokens < 2 or generator.random() < 0.5:
            return self._draw_passage(generator, num_tokens)
        half = num_tokens // 2
        return np.concatenate([self._draw_passage(generator, each) for each in (half, num_tokens - half)])

    def _draw_passage(self, generator: np.random.Generator, num_tokens: int) -> Tokens:
        """Return consecutive tokens of the documents, with the first token of a content word at a random position.

        All content words that the documents contain are equally likely, and so are all places of one.
        """
        places = self._places_of_words[int(generator.integers(len(self._places_of_words)))]
        place = int(places[int(generator.integers(len(places)))])
        return self.read(max(place - int(generator.integers(num_tokens)), 0), num_tokens)

    @functools.cached_property
    def _places_of_words(self) -> list[Tokens]:
        """Positions in the documents, as `read` counts them, at which a content word begins, for each that occurs."""
        places: list[list[Tokens]] = [[] for _ in self._content_words]
        for index, end in enumerate(self._ends.tolist()):
            document = self._haystack.document(index)
            for word, found in zip(self._content_words, places, strict=True):
                starts = np.flatnonzero(document == word[0])
                starts = starts[starts <= len(document) - len(word)]
                for offset, token in enumerate(word):
                    starts = starts[document[starts + offset] == token]
                found.append(end - len(document) + starts)
        return [whole for found in places if len(whole := np.concatenate(found))]

    def _most_available(self, num_facts: int) -> int:
        counts = [count for count in self._questions if count <= num_facts]
        if not counts:
            raise InputError(
                f"data.recall.num_facts ({num_facts}) must be at least {min(self._questions)}, the smallest number of "
                "statements before a question of the stories"
            )
        return max(counts)


def _content_words(stories: Iterable[Story]) -> set[str]:
    """Return the answers, and the words that are in some questions but not in all."""
    questions = [question for story in stories for question in story.questions]
    words = [set(re.findall(r"\w+", question.text)) for question in questions]
    return {question.answer for question in questions} | set.union(*words) - set.intersection(*words)
