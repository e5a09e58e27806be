"""Train a classifier that names the author of an excerpt, and test it on books that it has not seen.

    python experiments/authors.py data/classics/{train,valid,test}.jsonl.xz

Authors with at least four books take part; the last book of each, by title, is held out. Tokens are words. The output
is the accuracy for excerpts of several lengths, beside chance and beside the accuracy of the same weights if the memory
is erased before every segment, so that only the last segment counts.
"""

import argparse
import json
import lzma
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from memformer import MemformerClassificationConfig, MemformerForSequenceClassification, backpropagate

FEWEST_BOOKS = 4
SEGMENT_LENGTH = 32
TRAINED_SEGMENTS = 8
TESTED_SEGMENTS = (1, 4, 16, 64)
NUM_TESTED = 20  # excerpts of each author and length
VOCAB_SIZE = 3000  # the most frequent words of the training books, and one id for all others


def main() -> None:
    """Train, test and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines with author, title and text (.jsonl.xz).")
    parser.add_argument("--updates", type=int, default=200, help="Number of updates, at least 1.")
    parser.add_argument(
        "--pooling", choices=["mean", "last", "memory"], default="mean", help="Pooling of the classifier."
    )
    parser.add_argument(
        "--label_unit", choices=["document", "segment"], default="segment", help="Where labels stand in training."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the excerpts.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    options = parser.parse_args()
    if options.updates < 1:
        parser.error(f"--updates is {options.updates}; it must be at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    training, held_out = read_books(options.files)
    start = time.process_time()
    model = train(training, options)
    seconds = time.process_time() - start
    found = {
        "authors": sorted(training),
        "chance": 1 / len(training),
        "cpu_seconds": round(seconds, 1),
        "accuracy": {length: accuracies(model, held_out, length, seed=options.seed) for length in TESTED_SEGMENTS},
    }
    if options.json:
        print(json.dumps(found))
        return
    print(f"{len(training)} authors, chance {found['chance']:.3f}; trained in {seconds:.0f} s of one core")
    for length, (with_memory, erased) in found["accuracy"].items():
        print(f"{length:4} segments ({length * SEGMENT_LENGTH:5} words): {with_memory:.3f}  memory erased {erased:.3f}")


def read_books(files: list[Path]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the token ids of each author's training books, joined, and of the held-out book.

    Raises:
        SystemExit: A file cannot be read, fewer than two authors have enough books, or a book is too short.
    """
    by_author = defaultdict(dict)
    for file in files:
        try:
            with lzma.open(file, "rt", encoding="utf-8") as lines:
                for book in map(json.loads, lines):
                    by_author[book["author"]][book["title"]] = book["text"]
        except (OSError, lzma.LZMAError, ValueError, TypeError, KeyError) as error:
            raise SystemExit(
                f"{file} must hold JSON lines with author, title and text (.jsonl.xz): {error!r}"
            ) from error
    training, held_out = {}, {}
    for author, books in by_author.items():
        if len(books) >= FEWEST_BOOKS:
            *earlier, last = (words_of(books[title]) for title in sorted(books))
            training[author], held_out[author] = [word for words in earlier for word in words], last
    if len(training) < 2:
        raise SystemExit(f"the files have {len(training)} authors with {FEWEST_BOOKS} books or more; 2 are needed")
    for books, num_segments in ((training, TRAINED_SEGMENTS), (held_out, max(TESTED_SEGMENTS))):
        for author, words in books.items():
            if len(words) < (fewest := num_segments * SEGMENT_LENGTH):
                raise SystemExit(
                    f"{author} has {len(words)} words {'to train' if books is training else 'in the book held out'}; "
                    f"{fewest} are needed"
                )
    counts = Counter()
    for words in training.values():
        counts.update(words)
    ids = {word: index for index, (word, _) in enumerate(counts.most_common(VOCAB_SIZE - 1))}
    return tuple(
        {author: np.array([ids.get(word, VOCAB_SIZE - 1) for word in words]) for author, words in books.items()}
        for books in (training, held_out)
    )


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case."""
    return re.findall(r"[a-z']+|[^\w\s]", text.lower())


def train(books: dict[str, np.ndarray], options: argparse.Namespace) -> MemformerForSequenceClassification:
    """Return a classifier trained on random excerpts, by memory replay."""
    config = MemformerClassificationConfig(
        vocab_size=VOCAB_SIZE,
        num_labels=len(books),
        label_unit=options.label_unit,
        pooling=options.pooling,
        d_model=64,
        num_heads=4,
        d_ff=128,
        num_encoder_layers=2,
        num_slots=8,
        segment_length=SEGMENT_LENGTH,
        dropout=0.1,
    )
    model = MemformerForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=options.updates, pct_start=0.1)
    random = np.random.default_rng(options.seed)
    authors = sorted(books)
    for _ in range(options.updates):
        labels = random.integers(len(authors), size=16).tolist()
        documents = [excerpt(books[authors[label]], TRAINED_SEGMENTS, random) for label in labels]
        if options.label_unit == "segment":
            labels = [[label] * TRAINED_SEGMENTS for label in labels]
        optimizer.zero_grad()
        backpropagate(model, model.make_rollout(documents, labels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracies(
    model: MemformerForSequenceClassification, books: dict[str, np.ndarray], num_segments: int, *, seed: int
) -> tuple[float, float]:
    """Return the accuracy after the last segment, with the memory and with the memory erased."""
    random = np.random.default_rng(seed)
    labels = [label for label in range(len(books)) for _ in range(NUM_TESTED)]
    documents = [excerpt(books[author], num_segments, random) for author in sorted(books) for _ in range(NUM_TESTED)]
    truth = torch.tensor(labels)

    def accuracy(excerpts: list[np.ndarray]) -> float:
        given = [[label] * -(-len(each) // SEGMENT_LENGTH) for label, each in zip(labels, excerpts, strict=True)]
        rollout = model.make_rollout(excerpts, given if model.config.label_unit == "segment" else labels)
        found, _ = model.rollout_log_probabilities(rollout)
        return (found[-1].argmax(dim=-1) == truth).double().mean().item()

    return accuracy(documents), accuracy([document[-SEGMENT_LENGTH:] for document in documents])


def excerpt(book: np.ndarray, num_segments: int, random: np.random.Generator) -> np.ndarray:
    """Return consecutive words of a book, from a random place."""
    length = num_segments * SEGMENT_LENGTH
    start = random.integers(len(book) - length + 1)
    return book[start : start + length]


if __name__ == "__main__":
    main()
