"""What tests/soak/fuzz.py damages of what is saved: it is read exactly as it was written, or refused.

Of configs that people edit, what they say counts.
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
from memformer.training.checkpoint import TrainingState, canonical, load_checkpoint, save_checkpoint
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.loop import check_same_run
from memformer.training.optimizer import make_optimizer
from memformer.training.run_folder import RUN_CONFIG_FILE, read_run_config, write_run_config
from memformer.utils.files import read_json
from tests.helpers import tiny_config

TEXTS = ["the cat sat on the mat\n", "the dog  sat on the log " * 5, "Äpfel über 猫\n\nof <unk> lines"]


def small_model() -> Memformer:
    """Return a model that is saved and read in a millisecond."""
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
        """Read it and compare."""
        found = Session.load(self.files[0], model=self.model)._state()
        return all(torch.equal(found[name], tensor) for name, tensor in self.session._state().items())


class WeightsFile:
    """The weights of a saved model."""

    name, weight = "weights", 1.0

    def __init__(self, base: Path) -> None:
        self.model, self.folder = small_model(), base / "model"
        self.model.save_pretrained(self.folder)
        self.files = [self.folder / "model.safetensors"]

    def is_as_written(self) -> bool:
        """Read it and compare."""
        return same_weights(Memformer.from_pretrained(self.folder), self.model)


class ConfigFile(WeightsFile):
    """The config of a saved model: a text that people may edit, so what it says counts, if it can be."""

    name = "config"

    def __init__(self, base: Path) -> None:
        super().__init__(base / "configured")
        self.files = [self.folder / "config.json"]

    def is_as_written(self) -> bool:
        """Read it and compare with what it says."""
        model = Memformer.from_pretrained(self.folder)
        said = {key: value for key, value in read_json(self.files[0]).items() if key != "model_type"}
        has = canonical(model.config.to_dict())
        return all(has[key] == value for key, value in said.items()) and same_weights(model, self.model)


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
        """Return a state to save, or to load into."""
        model = small_model()
        memory = model.initial_memory(2).detach().clone()
        return TrainingState(model, make_optimizer(model, TrainingConfig()), memory, {"num_updates": 1})

    def is_as_written(self) -> bool:
        """Read it and compare."""
        found = self.fresh_state()
        load_checkpoint(self.folder, found)
        same_memory = torch.equal(found.memory, self.state.memory)
        return same_weights(found.model, self.state.model) and same_memory and found.progress == self.state.progress


def same_weights(model: Memformer, other: Memformer) -> bool:
    """Whether two models have the same weights."""
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class RunFolder:
    """The config that a run has saved."""

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
        """Read it both ways and compare."""
        saved, parsed = read_run_config(self.folder), parse_run_config([str(self.folder)])[0]
        return parsed == self.config and saved == canonical(self.config.to_dict())


class EditedRunFolder(RunFolder):
    """The same changed by hand, so without a checksum: what it says counts, but a run goes on as itself only."""

    name, weight = "edited run config", 0.5

    def __init__(self, base: Path) -> None:
        super().__init__(base / "edited")
        self.files[0].write_text(self.files[0].read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")

    def is_as_written(self) -> bool:
        """Read it as a run that goes on does, and compare what may not change."""
        saved = read_run_config(self.folder)
        check_same_run(saved, self.config)
        written = canonical(self.config.to_dict())
        return all(said_in(saved.get(key)) == said_in(written[key]) for key in ("seed", "model", "data"))


def said_in(value: Any) -> Any:
    """Return what counts in a part of a run's config: a null says the same as nothing, and the cache may move."""
    if not isinstance(value, dict):
        return value
    return {key: said_in(each) for key, each in value.items() if each is not None and key != "cache"}


def small_tokenizers() -> list[Tokenizer]:
    """Return a tokenizer of every kind: of bytes, pixels, byte pairs and words."""
    documents = [Document(str(number), text.encode()) for number, text in enumerate(TEXTS)]
    bpe, word = (train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), documents) for kind in ("bpe", "word"))
    return [ByteTokenizer(), PixelTokenizer(4, 2, 3), bpe, word]


class TokenCache:
    """Token ids that were built before."""

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
        """Return the ids of every document, and its size in bytes."""
        corpus = build_corpus(self.source, self.tokenizer, cache=self.cache, max_document_tokens=7)
        ids = [corpus.document(index).tolist() for index in range(corpus.num_documents)]
        return list(zip(ids, corpus.document_bytes.tolist(), strict=True))

    def is_as_written(self) -> bool:
        """Read it and compare."""
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
        """Read it and compare."""
        found, expected = load_tokenizer(self.folder), self.tokenizer
        ids = list(range(expected.vocab_size))
        return (
            (type(found), found.kind, found.fingerprint) == (type(expected), expected.kind, expected.fingerprint)
            and "".join(found.decode_stream(ids)) == "".join(expected.decode_stream(ids))
            and self.ids_of_texts(found) == self.ids_of_texts(expected)
        )

    def ids_of_texts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return the ids of some texts, or nothing for images."""
        is_of_texts = isinstance(tokenizer, ByteTokenizer | TextTokenizer)
        return [tokenizer.encode(text.encode(), "text").tolist() for text in TEXTS] if is_of_texts else []
