"""Targets of tests/soak/fuzz.py that the library saves: a file must be read exactly as written, or be refused.

For configs that users may edit, the current content of the file counts.
"""

from pathlib import Path
from typing import Any

import torch

from memformer import Memformer, Session
from memformer.cli.run_config import parse_run_config
from memformer.data import (
    ByteTokenizer,
    CurriculumConfig,
    Document,
    PixelTokenizer,
    RecallConfig,
    SourceConfig,
    TextTokenizer,
    Tokenizer,
    TokenizerConfig,
    build_corpus,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from memformer.errors import CheckpointError
from memformer.training.checkpoint import TrainingState, canonical, load_checkpoint, save_checkpoint
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.optimizer import make_optimizer
from memformer.training.run_folder import RUN_CONFIG_FILE, read_run_config, write_run_config
from memformer.training.run_inputs import find_changed_key
from memformer.utils.files import read_json
from tests.helpers import tiny_config

TEXTS = ["the cat sat on the mat\n", "the dog  sat on the log " * 5, "Äpfel über 猫\n\nof <unk> lines"]


def small_model() -> Memformer:
    """Return a model that is saved and loaded in one millisecond."""
    return Memformer(tiny_config(num_encoder_layers=1, num_decoder_layers=1))


class SessionFile:
    """A saved session."""

    name, weight = "session", 1.0

    def __init__(self, base: Path) -> None:
        self.model = small_model()
        self.session = Session(self.model)
        self.session.feed([1, 2, 3, 4, 5, 6, 7, 8])
        self.files = [base / "session"]
        self.session.save(self.files[0])

    def is_as_written(self) -> bool:
        """Read the files and compare."""
        found = Session.load(self.files[0], model=self.model)._streams.state()
        return all(torch.equal(found[name], tensor) for name, tensor in self.session._streams.state().items())


class WeightsFile:
    """The weights of a saved model."""

    name, weight = "weights", 1.0

    def __init__(self, base: Path) -> None:
        self.model, self.folder = small_model(), base / "model"
        self.model.save_pretrained(self.folder)
        self.files = [self.folder / "model.safetensors"]

    def is_as_written(self) -> bool:
        """Read the files and compare."""
        return same_weights(Memformer.from_pretrained(self.folder), self.model)


class ConfigFile(WeightsFile):
    """The config of a saved model. Users may edit it, so its current content must be read if it is valid."""

    name = "config"

    def __init__(self, base: Path) -> None:
        super().__init__(base / "configured")
        self.files = [self.folder / "config.json"]

    def is_as_written(self) -> bool:
        """Load the model and compare its config with the file."""
        model = Memformer.from_pretrained(self.folder)
        written = {key: value for key, value in read_json(self.files[0]).items() if key != "model_type"}
        loaded = canonical(model.config.to_dict())
        return all(loaded[key] == value for key, value in written.items()) and same_weights(model, self.model)


class CheckpointFolder:
    """A checkpoint of a training run."""

    name, weight = "checkpoint", 1.0

    def __init__(self, base: Path) -> None:
        self.folder = base / "checkpoints" / "update-000000001"
        self.folder.parent.mkdir()
        self.state = self.fresh_state()
        save_checkpoint(self.folder, self.state)
        self.files = sorted(self.folder.iterdir())

    def fresh_state(self) -> TrainingState:
        """Return a training state to save or to load into."""
        model = small_model()
        memory = model.initial_memory(2).detach().clone()
        return TrainingState(model, make_optimizer(model, TrainingConfig()), memory, {"num_updates": 1})

    def is_as_written(self) -> bool:
        """Read the files and compare."""
        found = self.fresh_state()
        load_checkpoint(self.folder, found)
        same_memory = torch.equal(found.memory, self.state.memory)
        return same_weights(found.model, self.state.model) and same_memory and found.progress == self.state.progress


def same_weights(model: Memformer, other: Memformer) -> bool:
    """Whether two models have the same weights."""
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class RunFolder:
    """The config saved by a run."""

    name, weight = "saved run config", 1.0

    def __init__(self, base: Path) -> None:
        self.folder = base / "run"
        self.config = RunConfig(
            folder=str(self.folder),
            data=DataConfig(recall=RecallConfig(max_distance=8, curriculum=CurriculumConfig())),
        )
        write_run_config(self.folder, self.config.to_dict())
        self.files = [self.folder / RUN_CONFIG_FILE]

    def is_as_written(self) -> bool:
        """Read the config in both ways and compare."""
        saved, parsed = read_run_config(self.folder), parse_run_config([str(self.folder)])[0]
        return parsed == self.config and saved == canonical(self.config.to_dict())


class EditedRunFolder(RunFolder):
    """A saved config without its checksum, as after editing: its content counts, but must allow resuming the run."""

    name, weight = "edited run config", 0.5

    def __init__(self, base: Path) -> None:
        super().__init__(base / "edited")
        self.files[0].write_text(self.files[0].read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")

    def is_as_written(self) -> bool:
        """Read the config as when resuming, and compare the sections that must not change."""
        saved = read_run_config(self.folder)
        if change := find_changed_key(saved, self.config):
            raise CheckpointError(change)
        written, defaults = canonical(self.config.to_dict()), canonical(RunConfig().to_dict())
        return saved.get("seed") == written["seed"] and all(
            relevant_part(saved.get(key), defaults[key]) == relevant_part(written[key], defaults[key])
            for key in ("data", "model")
        )


def relevant_part(value: Any, defaults: Any = None) -> Any:
    """Return a section of a run config without values that equal missing keys, and without the cache folder.

    Args:
        value: The section.
        defaults: The defaults of missing keys. None: only null equals a missing key.
    """
    if not isinstance(value, dict):
        return value
    defaults = defaults if isinstance(defaults, dict) else {}
    parts = {key: relevant_part(each, defaults.get(key)) for key, each in value.items() if key != "cache"}
    return {key: part for key, part in parts.items() if part is not None and part != defaults.get(key)}


def small_tokenizers() -> list[Tokenizer]:
    """Return a tokenizer of every kind: bytes, pixels, byte pairs and words."""
    documents = [Document(str(number), text.encode()) for number, text in enumerate(TEXTS)]
    bpe, word = (train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), documents) for kind in ("bpe", "word"))
    return [ByteTokenizer(), PixelTokenizer(4, 2, 3), bpe, word]


class TokenCache:
    """Cached token ids."""

    name, weight = "token cache", 1.0

    def __init__(self, base: Path) -> None:
        self.cache = base / "built"
        _, _, self.tokenizer, _ = small_tokenizers()
        source = base / "cached"
        source.mkdir()
        for number, text in enumerate(TEXTS):
            (source / f"{number}.txt").write_text(text, encoding="utf-8")
        self.source = SourceConfig(path=str(source))
        self.documents = self.read()
        self.files = sorted(file for folder in self.cache.iterdir() for file in folder.iterdir())

    def read(self) -> list[tuple[list[int], int]]:
        """Return the token ids and the size in bytes of every document."""
        corpus = build_corpus(self.source, self.tokenizer, cache=self.cache, max_document_tokens=7)
        ids = [corpus.document(index).tolist() for index in range(corpus.num_documents)]
        return list(zip(ids, corpus.document_bytes.tolist(), strict=True))

    def is_as_written(self) -> bool:
        """Read the files and compare."""
        return self.read() == self.documents


class TokenizerFolder:
    """A saved tokenizer."""

    weight = 0.5

    def __init__(self, base: Path, tokenizer: Tokenizer) -> None:
        self.name = f"{tokenizer.kind} tokenizer"
        self.folder, self.tokenizer = base / self.name, tokenizer
        save_tokenizer(tokenizer, self.folder)
        self.files = sorted(self.folder.iterdir())

    def is_as_written(self) -> bool:
        """Read the files and compare."""
        found, expected = load_tokenizer(self.folder), self.tokenizer
        ids = list(range(expected.vocab_size))
        return (
            (type(found), found.kind, found.fingerprint) == (type(expected), expected.kind, expected.fingerprint)
            and "".join(found.decode_stream(ids)) == "".join(expected.decode_stream(ids))
            and self.ids_of_texts(found) == self.ids_of_texts(expected)
        )

    def ids_of_texts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return the token ids of some texts; empty for images."""
        is_of_texts = isinstance(tokenizer, ByteTokenizer | TextTokenizer)
        return [tokenizer.encode(text.encode(), "text").tolist() for text in TEXTS] if is_of_texts else []
