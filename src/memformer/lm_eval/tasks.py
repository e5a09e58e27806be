"""Documents of the task pack, made from files of the user's; the harness's task files in `pack` name these functions.

Every function is given the task's `dataset_kwargs` and the harness's metadata, to which the harness adds the arguments
of the model. Its result depends only on the files, the tokenizer and the sizes. Read by all tasks from the metadata:

    wikitext, books, babi: A file, a folder or a glob pattern, instead of the place below the data folder.
    num_docs: Number of documents of a task, instead of the task's own; not of wikitext and books, which read all.
    tokenizer: `bytes`, or the folder or hub name of a model whose tokens are counted. Without it, `pretrained` counts.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memformer.data import ByteTokenizer, Corpus, SourceConfig, Tokenizer, corpus_from_arrays, iterate_documents
from memformer.data.document_end import plain
from memformer.data.files import locate_files
from memformer.data.recall.config import RecallConfig
from memformer.data.recall.stream import append_question, insert_facts, make_text_task
from memformer.data.recall.tasks import RecallTask
from memformer.data.tokenizer_training import has_tokenizer, load_tokenizer
from memformer.data.tokenizers import decode_utf8, text_bytes
from memformer.errors import InputError
from memformer.models.hugging_face import find_model_folder
from memformer.utils.checks import check_integer
from memformer.utils.files import user_path

DATA_VARIABLE = "MEMFORMER_DATA"
# Where each set is below the data folder, as for `memformer reproduce`.
_PLACES = {
    "wikitext": "wikitext-2/test*",
    "books": "classics/test*",
    "babi": "babi/en/qa1_single-supporting-fact_test*",
}
_MOST_FACTS = 10
# A passage of the last-word task has about this many characters, and its last word is not in the last of them.
_PASSAGE_CHARACTERS = 2000
_FAR_CHARACTERS = 200
# The last word is at most this fraction of a book's words.
_RARE = 1 / 5000
_WORD = re.compile(r"[A-Za-z]+")
_LAST_WORD = re.compile(r"(?<= )[A-Za-z]{4,}(?=[.!?])")
_SENTENCE_START = re.compile(r"(?<=[.!?] )(?=[A-Z])|(?<=\n)(?=\S)")

Docs = list[dict[str, str]]


def wikitext(**metadata: Any) -> dict[str, Any]:
    """Return WikiText-2 as one document, the whole file.

    Raises:
        InputError: The data are missing.
    """
    return _as_dataset([{"text": text} for text in _texts("wikitext", metadata)])


def books(**metadata: Any) -> dict[str, Any]:
    """Return one document for each book.

    Raises:
        InputError: The data are missing.
    """
    return _as_dataset([{"text": text} for text in _texts("books", metadata)])


def last_words(*, num_docs: int, **metadata: Any) -> dict[str, Any]:
    """Return passages of books and their last words.

    The last word of a passage is rare in its book, and occurs in the passage before, but not shortly before. Passages
    do not overlap. If there are more than `num_docs`, they are spread evenly over the books.

    Raises:
        InputError: The data are missing, or no passage is found.
    """
    num_docs = check_integer("num_docs", num_docs, 1)
    found = [passage for text in _texts("books", metadata) for passage in _passages(text)]
    if not found:
        raise InputError("the books have no passage whose last word occurs in it before; they may be too short")
    chosen = np.linspace(0, len(found) - 1, min(num_docs, len(found))).round().astype(int).tolist()
    return _as_dataset([found[index] for index in chosen])


def passkey(*, num_tokens: int, num_docs: int, **metadata: Any) -> dict[str, Any]:
    """Return books of `num_tokens` tokens with a pass key in their beginning and the question at their end.

    Raises:
        InputError: The data are missing, or the text is too short for the task.
    """
    tokenizer = _tokenizer(metadata)
    haystack = _haystack(_path("books", metadata), tokenizer)
    task = make_text_task(RecallConfig(task="passkey"), tokenizer, haystack, path=None)
    return _as_dataset(_episodes(task, num_tokens=num_tokens, num_docs=num_docs))


def babi(*, num_tokens: int, num_docs: int, **metadata: Any) -> dict[str, Any]:
    """Return books of `num_tokens` tokens with a story of bAbI in their beginning and its question at their end.

    Raises:
        InputError: The data are missing, or the text is too short for the task.
    """
    tokenizer, path = _tokenizer(metadata), _path("babi", metadata)
    config = RecallConfig(task="babi", path=path, validation_path=path, num_facts=(_MOST_FACTS, _MOST_FACTS))
    task = make_text_task(config, tokenizer, _haystack(_path("books", metadata), tokenizer), path=path)
    return _as_dataset(_episodes(task, num_tokens=num_tokens, num_docs=num_docs))


def _as_dataset(docs: Docs) -> dict[str, Any]:
    """Return the documents as the harness takes them, in memory."""
    from datasets import Dataset  # slow to import

    return {"test": Dataset.from_list(docs)}


def _episodes(task: RecallTask, *, num_tokens: int, num_docs: int) -> Docs:
    """Return texts with facts, then filler, then a question, and the answers.

    Each fact is in a block of its own, at a random place. The blocks are the beginning of the text, so the distance
    between the facts and the question is nearly the whole text.

    Raises:
        InputError: A number is too small.
    """
    num_docs, num_tokens = check_integer("num_docs", num_docs, 1), check_integer("num_tokens", num_tokens, 1)
    block = 1 << (2 * task.fact_length - 1).bit_length()
    generator = np.random.Generator(np.random.PCG64(num_tokens))
    docs = []
    for _ in range(num_docs):
        episode = task.make_episode(generator, _MOST_FACTS)
        num_facts = len(episode.facts)
        rest = num_tokens - num_facts * block
        if rest < task.question_length:
            raise InputError(
                f"num_tokens ({num_tokens}) must be at least {num_facts * block + task.question_length}, for "
                f"{num_facts} facts and a question"
            )
        beginning = insert_facts(task, [episode], range(num_facts), range(num_facts), block, generator)
        tokens = np.concatenate([beginning.reshape(-1), task.make_filler(generator, rest)])
        question = episode.questions[int(generator.integers(len(episode.questions)))]
        append_question(tokens, question)
        docs.append({"context": _decode(task, tokens), "answer": _decode(task, question.answer).strip()})
    return docs


def _decode(task: RecallTask, tokens: Any) -> str:
    text = task.tokenizer.decode(tokens.tolist()).decode("utf-8", errors="surrogateescape")
    # Text was cut within characters; as many spaces leave the number of bytes as it is.
    return re.sub("[\udc80-\udcff]", " ", text)


def _passages(text: str) -> Iterator[dict[str, str]]:
    counts = Counter(_WORD.findall(text))
    most = counts.total() * _RARE
    free = 0
    for match in _LAST_WORD.finditer(text):
        word, end = match.group(), match.start() - 1
        start = _SENTENCE_START.search(text, max(free, end - _PASSAGE_CHARACTERS))
        if counts[word] > most or start is None or start.start() > end - 2 * _FAR_CHARACTERS:
            continue
        before = text[start.start() : end]
        places = [found.start() for found in re.finditer(rf"\b{word}\b", before)]
        if places and places[-1] < len(before) - _FAR_CHARACTERS:
            yield {"context": before, "answer": word}
            free = match.end()


def _path(name: str, metadata: dict[str, Any]) -> str:
    """Return the path of a data set.

    Raises:
        InputError: No place is given.
    """
    if name in metadata:
        return str(metadata[name])
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise InputError(
            f"the task needs data: give --data FOLDER (or the environment variable {DATA_VARIABLE}), which has "
            f"{_PLACES[name]}, or its path as {name!r} in --metadata"
        )
    return str(user_path(folder) / _PLACES[name])


def _texts(name: str, metadata: dict[str, Any]) -> list[str]:
    return [decode_utf8(content, name=title) for title, content in _documents(_path(name, metadata))]


def _documents(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and texts of the documents in a path: lines of JSON files, otherwise files."""
    is_json = ".jsonl" in Path(locate_files(path)[0].path).suffixes
    for document in iterate_documents(SourceConfig(kind="jsonl" if is_json else "text", path=path)):
        content = text_bytes(document.content, kind="text", name=document.name)
        if content:
            yield document.name, content


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer whose tokens are counted.

    Raises:
        InputError: None is named, or the folder has none.
        CheckpointError: A file is damaged.
    """
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if name is None:
        raise InputError(
            "the task counts tokens: give pretrained in --model_args, or tokenizer in --metadata (a folder or 'bytes')"
        )
    if name == "bytes":
        return ByteTokenizer()
    folder = find_model_folder(str(name))
    # As in `load_run`, a folder without a tokenizer is read as bytes, with a warning there.
    return plain(load_tokenizer(folder)) if has_tokenizer(folder) else ByteTokenizer()


# All sizes of a task have the same books.
_haystacks: dict[tuple[str, str], Corpus] = {}


def _haystack(path: str, tokenizer: Tokenizer) -> Corpus:
    key = path, tokenizer.fingerprint
    if key not in _haystacks:
        _haystacks.clear()
        documents = [tokenizer.encode(content, name) for name, content in _documents(path)]
        _haystacks[key] = corpus_from_arrays(documents, vocab_size=tokenizer.vocab_size)
    return _haystacks[key]
