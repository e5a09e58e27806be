"""Stories, documents that hide facts, and text tasks made of both."""

import re

import numpy as np

from memformer.data import Document, RecallConfig, TokenizerConfig, corpus_from_arrays, make_text_task, train_tokenizer
from memformer.data.recall.stream import task_text

STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk.
5 Mary went to the kitchen.
6 Where is Mary?\tkitchen\t5
7 What is Mary carrying?\tmilk,football
1 Sandra went to the garden.
2 Is Sandra in the garden?\tyes\t1
"""

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "did", "not"]

KINDS = ("bytes", "bpe", "word")


def write_stories(folder, text=STORIES, name="stories.txt"):
    path = folder / name
    path.write_text(text)
    return str(path)


def babi(path, **fields):
    return RecallConfig(**{"task": "babi", "path": path, "validation_path": path, "num_facts": (1, 9), **fields})


def haystack_texts(num_documents=9):
    """Return documents without any word of a fact, each beginning with its own number."""
    generator = np.random.default_rng(0)
    return [f"{index} " + " ".join(generator.choice(WORDS, size=7 + 20 * index)) for index in range(num_documents)]


def tokenizer_of(kind, config):
    documents = [Document(str(index), text.encode()) for index, text in enumerate(haystack_texts())]
    vocab_size = {"bytes": None, "bpe": 400, "word": None}[kind]
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), documents, text=task_text(config, kind))


def text_task(config, kind="word", *, tokenizer=None, texts=None):
    tokenizer = tokenizer or tokenizer_of(kind, config)
    arrays = [tokenizer.encode(text.encode(), "haystack") for text in texts or haystack_texts()]
    return make_text_task(config, tokenizer, corpus_from_arrays(arrays, tokenizer.vocab_size), path=config.path)


def text_of(task, tokens):
    """Return the text of tokens in one form for all kinds: no space before punctuation, digits joined."""
    text = task.tokenizer.decode([int(token) for token in tokens]).decode()
    return re.sub(r"(?<=\d) (?=\d)", "", re.sub(r" ([.?,]) ?", r"\1 ", text)).strip()
