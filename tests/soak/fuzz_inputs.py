"""Targets of tests/soak/fuzz.py that users write: reading must return the current content of a file, or be refused.

The expected content of a damaged file is computed here by a few lines of independent code.
"""

import dataclasses
import datetime
import gzip
import json
import lzma
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from memformer.cli.run_config import parse_run_config
from memformer.data import SourceConfig, TokenizerConfig
from memformer.data.recall.text_tasks import Story, read_stories
from memformer.errors import InputError
from memformer.training.config import DataConfig
from memformer.training.run_data import DocumentData, prepare_data

TEXTS = ["the cat sat on the mat", "", "Äpfel über 猫\nof two lines", "the dog sat on the log " * 5]
GREY_LEVELS = 4
STORIES = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk.
5 What is Mary carrying?\tmilk,football\t4
6 Where is John?\thallway\t2

1 Sandra went to the garden.
2 Is Sandra in the garden?\tyes\t1
"""
RUN_CONFIG = """\
# All kinds of values: numbers, names, paths, lists, nested mappings, missing keys.
folder: runs/passkey
seed: 3
threads: 1
model:
  d_model: 64
  num_heads: 4
  num_slots: 16
  write_competition: true
  write_normalizer: entmax15
  forgetting_speeds: [0.1, 1.0e-3]
  attention_dropout: 0.0
  dropout: 0.1
data:
  train:
    kind: jsonl
    path: [books, more/*.jsonl.gz]
    text_key: body
  validation:
    kind: text
    path: held-out
    documents: ':1000'
  tokenizer:
    kind: bpe
    vocab_size: 1000
  max_document_tokens: 8192
  recall:
    task: passkey
    max_distance: 64
    question_probability: 0.5
    curriculum:
      start_distance: 2
      advance_below: 0.2
training:
  num_updates: 3000
  method: replay
  learning_rate: 3e-3
  betas: [0.9, 0.95]
  write_penalty: 0.001
  evaluation_tokens: null
"""


class RunConfigFile:
    """A user-written config for `memformer train`: its values must be read, with the defaults for missing keys."""

    name, weight = "run config", 0.5

    def __init__(self, base: Path) -> None:
        self.files = [base / "passkey.yaml"]
        self.files[0].write_text(RUN_CONFIG, encoding="utf-8")

    def is_as_written(self) -> bool:
        """Read the config and compare it with the YAML."""
        config, _ = parse_run_config([str(self.files[0])])
        return equals_yaml(config, yaml.safe_load(self.files[0].read_text(encoding="utf-8")))


def equals_yaml(value: Any, parsed: Any) -> bool:
    """Whether a config value equals a parsed YAML value; fields of dataclasses missing in YAML must have defaults."""
    if isinstance(value, list | tuple) and isinstance(parsed, list | tuple):
        return len(value) == len(parsed) and all(map(equals_yaml, value, parsed))
    if not dataclasses.is_dataclass(value) or not isinstance(parsed, Mapping):
        # YAML parses 3e-3 and 089 as strings, and a name like 2020-01-01 as a date.
        is_number = isinstance(value, int | float) and isinstance(parsed, str)
        is_name = isinstance(value, str) and isinstance(parsed, datetime.date)
        return value == parsed or (is_number and value == float(parsed)) or (is_name and value == parsed.isoformat())
    fields = {field.name: field for field in dataclasses.fields(value)}
    return parsed.keys() <= fields.keys() and all(
        equals_yaml(getattr(value, name), parsed[name] if name in parsed else default_of(field))
        and (getattr(value, name) is not None or type(None) in get_args(field.type))
        for name, field in fields.items()
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class InputFiles(ABC):
    """Files with documents, whose current content must be read.

    A subclass writes `files` and sets `source` and `expected_documents`.
    """

    name = "input"
    weight = 0.5
    files: list[Path]
    source: SourceConfig
    tokenizer = TokenizerConfig()

    def __init__(self, base: Path) -> None:
        self.cache = base / f"cache of {self.name}"

    @abstractmethod
    def expected_documents(self) -> Iterator[bytes]:
        """Yield the content of every document."""

    def is_as_written(self) -> bool:
        """Read the files as a run does and compare; if they are refused, nothing may remain in the cache."""
        config = DataConfig(train=self.source, validation=self.source, tokenizer=self.tokenizer, cache=str(self.cache))
        try:
            data = prepare_data(config)
            assert isinstance(data, DocumentData)
            corpus = data.train
            documents = [corpus.document(index).tolist() for index in range(corpus.num_documents)]
            decoded = [data.tokenizer.decode(ids) for ids in documents]
            return decoded == [content for content in self.expected_documents() if content]
        except InputError:
            if any(self.cache.glob("*")):
                return False
            raise
        finally:
            shutil.rmtree(self.cache, ignore_errors=True)


class TextFiles(InputFiles):
    """A folder of texts, plain and compressed, on which a BPE tokenizer is trained."""

    name = "text files"
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=260)

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        folder, content = base / "texts", "".join(TEXTS).encode()
        folder.mkdir()
        self.files = [folder / name for name in ("a.txt", "b.txt.gz", "c.txt.xz")]
        for file, write in zip(self.files, (bytes, compress, lzma.compress), strict=True):
            file.write_bytes(write(content))
        self.source = SourceConfig(path=str(folder))

    def expected_documents(self) -> Iterator[bytes]:
        """Yield the content of the files, without empty files."""
        yield from (uncompressed(file) for file in self.files if file.stat().st_size)


class JsonLines(InputFiles):
    """A file with one text per line, as JSON."""

    name = "JSON lines"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.files = [base / "texts.jsonl"]
        lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(TEXTS)]
        self.files[0].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.source = SourceConfig(kind="jsonl", path=str(self.files[0]))

    def expected_documents(self) -> Iterator[bytes]:
        """Yield the text of every line."""
        lines = self.files[0].read_bytes().split(b"\n")
        yield from (json.loads(line)["text"].encode() for line in lines if line.strip())


class Images(InputFiles):
    """Grey-level images, plain and compressed."""

    name = "images"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        folder, pixels = base / "images", np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
        folder.mkdir()
        content = struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()
        self.files = [folder / "a", folder / "b.gz"]
        for file, write in zip(self.files, (bytes, compress), strict=True):
            file.write_bytes(write(content))
        self.source = SourceConfig(kind="idx", path=str(folder), levels=GREY_LEVELS)

    def expected_documents(self) -> Iterator[bytes]:
        """Yield the grey levels of every image, without empty files."""
        for file in self.files:
            if file.stat().st_size:
                content = uncompressed(file)
                num_images, height, width = struct.unpack(">3I", content[4:16])
                pixels = np.frombuffer(content[16:], np.uint8).reshape(num_images, height * width)
                yield from (bytes(pixel // (256 // GREY_LEVELS) for pixel in image.tolist()) for image in pixels)


class Stories:
    """bAbI stories."""

    name, weight = "stories", 0.5

    def __init__(self, base: Path) -> None:
        self.files = [base / "stories.txt"]
        self.files[0].write_text(STORIES, encoding="utf-8")

    def is_as_written(self) -> bool:
        """Read the stories and compare them with the lines of the file."""
        found = [line for story in read_stories(str(self.files[0])) for line in story_lines(story)]
        lines = [line for line in self.files[0].read_bytes().decode().split("\n") if line.strip()]
        parts = [[part.strip() for part in line.partition(" ")[2].split("\t")][:2] for line in lines]
        return found == [(line.partition(" ")[0], *part) for line, part in zip(lines, parts, strict=True)]


def story_lines(story: Story) -> Iterator[tuple[str, ...]]:
    """Yield number, text and, for a question, answer of every line of a story."""
    lines: list[tuple[str, ...]] = []
    for number, statement in enumerate(story.statements, start=1):
        lines.append((statement,))
        lines += [(question.text, question.answer) for question in story.questions if question.num_statements == number]
    yield from ((str(number), *line) for number, line in enumerate(lines, start=1))


def compress(content: bytes) -> bytes:
    """Compress with gzip, without a time stamp."""
    return gzip.compress(content, mtime=0)


def uncompressed(file: Path) -> bytes:
    """Return the content of a file, decompressed if it is compressed."""
    content = file.read_bytes()
    readers: dict[bytes, Callable[[bytes], bytes]] = {b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ\0": lzma.decompress}
    return next((read for start, read in readers.items() if content.startswith(start)), bytes)(content)
