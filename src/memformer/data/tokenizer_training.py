"""Training, saving and loading of tokenizers."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import pre_tokenizers, trainers

from memformer.data.bins import BinTokenizer, Spacing
from memformer.data.document_end import DocumentEndTokenizer, fingerprint_with_end, plain
from memformer.data.documents import Document
from memformer.data.outside_tokenizers import (
    TOKENIZER_FILE,
    PretrainedTokenizer,
    parse_definition,
    read_outside_tokenizer,
)
from memformer.data.tokenizer_json import from_tokenizer_json
from memformer.data.tokenizer_pipelines import END_OF_LINE, UNKNOWN_WORD, bpe_pipeline, word_pipeline
from memformer.data.tokenizers import (
    ByteTokenizer,
    PixelTokenizer,
    TextTokenizer,
    Tokenizer,
    blocks_of_lines,
    decode_utf8,
    fingerprint_of_text,
)
from memformer.errors import CheckpointError, InputError
from memformer.utils.checks import check_integer
from memformer.utils.fields import convert_fields
from memformer.utils.files import user_path, write_bytes
from memformer.utils.words import with_article

_FORMAT_VERSION = 1
_CONFIG_FILE = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of texts and series; images need none, because their token ids are grey levels.

    Args:
        kind: bytes: every byte is a token. bpe: byte-level byte-pair encoding, trained on the documents of data.train,
            also on those that data.validation_fraction holds out. word: words of the same documents, separated by white
            space, with <eos> for the end of a line and <unk> for rare words (the convention of WikiText). pretrained: a
            tokenizer made elsewhere, which must restore every text exactly. bins: for series (data.train.kind array),
            values are quantized into bins, which are fitted on the training documents.
        vocab_size: For bpe: number of tokens, at least 257; it may turn out lower if the documents contain too few
            pairs to merge. For word: maximum number of tokens, most frequent words first; null: all words.
        path: For pretrained: a tokenizer.json, or a folder that holds one. The run keeps a copy.
        num_bins: For bins: number of bins of each column; every column has token ids of its own.
        spacing: For bins: quantile for bins that hold about as many training values each (fewer bins if a column has
            few different values), or uniform for bins of equal width between the smallest and the largest training
            value. Values outside of the training data belong to the outer bins.

    Raises:
        InputError: A field is missing, or does not fit the kind.
    """

    kind: Literal["bytes", "bpe", "word", "pretrained", "bins"] = "bytes"
    vocab_size: int | None = None
    path: str | None = None
    num_bins: int = 64
    spacing: Spacing = "quantile"

    def __post_init__(self) -> None:
        convert_fields(self)
        if self.path is not None and self.kind != "pretrained":
            raise InputError(f"path ({self.path!r}) is for tokenizers of kind 'pretrained', not {self.kind!r}")
        check_integer("num_bins", self.num_bins, 2)
        for name, default in (("num_bins", 64), ("spacing", "quantile")):
            value = getattr(self, name)
            if self.kind != "bins" and value != default:
                raise InputError(f"{name} ({value!r}) is for tokenizers of kind 'bins', not {self.kind!r}")
        match self.kind:
            case "pretrained":
                if self.path is None:
                    raise InputError("path must be given for kind 'pretrained': a tokenizer.json or its folder")
                if self.vocab_size is not None:
                    raise InputError(f"vocab_size ({self.vocab_size}) is not for kind 'pretrained', which has its own")
            case "bins":
                if self.vocab_size is not None:
                    raise InputError(f"vocab_size ({self.vocab_size}) is not for kind 'bins'; num_bins is")
            case "bytes":
                if self.vocab_size not in {None, 256}:
                    raise InputError(f"vocab_size ({self.vocab_size}) must be 256 or not given for kind 'bytes'")
            case "bpe":
                if self.vocab_size is None or self.vocab_size < 257:
                    raise InputError(f"vocab_size ({self.vocab_size}) must be given and at least 257 for kind 'bpe'")
            case "word":
                if self.vocab_size is not None and self.vocab_size < 3:
                    raise InputError(
                        f"vocab_size ({self.vocab_size}) must be at least 3 for kind 'word': "
                        f"{UNKNOWN_WORD}, {END_OF_LINE} and a word"
                    )


_LONG_WORD = re.compile(r"\S{1000}")


def train_tokenizer(
    config: TokenizerConfig,
    documents: Iterable[Document],
    *,
    text: str = "",
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Return a tokenizer of the configured kind, trained on `documents`; kinds bytes and pretrained read none of them.

    The same documents in the same order give the same tokenizer. Kind bins is for series; `fit_bins` makes it.

    Args:
        config: Kind and vocabulary size of the tokenizer.
        documents: The training documents, read once.
        text: Additional training text; kind word keeps all of its words, however rare they are.
        progress: Called with the number of bytes of the documents read so far.

    Raises:
        InputError: The kind is bins, a document is an image or not UTF-8, `vocab_size` is too small for the words of
            `text`, or the file of kind pretrained is missing or cannot be used.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "pretrained":
        assert config.path is not None
        return read_outside_tokenizer(config.path)
    if config.kind == "bins":
        raise InputError("a tokenizer of kind 'bins' is for series; fit_bins makes it")
    blocks = chain(blocks_of_lines(text), _text_blocks(documents, config.kind, progress))
    if config.kind == "bpe":
        assert config.vocab_size is not None
        return TextTokenizer("bpe", _train_bpe(blocks, vocab_size=config.vocab_size))
    return TextTokenizer("word", _train_words(blocks, text.split(), vocab_size=config.vocab_size))


def _text_blocks(documents: Iterable[Document], kind: str, progress: Callable[[int], None] | None) -> Iterator[str]:
    num_bytes = 0
    for name, content in documents:
        if not isinstance(content, bytes):
            raise InputError(f"document {name} is an image; a tokenizer of kind {kind!r} reads text")
        for block in blocks_of_lines(decode_utf8(content, name=name)):
            yield block
            num_bytes += len(block.encode())
            if progress is not None:
                progress(num_bytes)


def _train_bpe(blocks: Iterator[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = bpe_pipeline()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # All 256 bytes, so that every text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(map(_without_long_words, blocks)), trainer)
    return tokenizer


def _without_long_words(text: str) -> Iterator[str]:
    """Yield a text in parts, cut within words that are longer than any of a language, such as DNA or base64.

    Learning takes time quadratic in the length of a word. (Encoding does not, and cuts nothing.)
    """
    start = 0
    for word in _LONG_WORD.finditer(text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def _train_words(blocks: Iterator[str], kept_words: Sequence[str], *, vocab_size: int | None) -> tokenizers.Tokenizer:
    kept = list(dict.fromkeys([UNKNOWN_WORD, END_OF_LINE, *kept_words]))
    if vocab_size is not None and vocab_size < len(kept):
        raise InputError(f"vocab_size ({vocab_size}) must be at least {len(kept)} to keep all words of the recall task")
    counter = word_pipeline([UNKNOWN_WORD])
    # No limit here: <unk> and <eos> may occur among the words and must not displace two other words.
    trainer = trainers.WordLevelTrainer(vocab_size=2**31, special_tokens=[], show_progress=False)
    counter.train_from_iterator(blocks, trainer)
    ids = counter.get_vocab()
    commonest_first = sorted(ids.keys() - set(kept), key=ids.__getitem__)
    return word_pipeline([*kept, *commonest_first][:vocab_size])


def word_tokenizer(words: Sequence[str]) -> TextTokenizer:
    """Return a tokenizer of kind "word" with the vocabulary <unk>, <eos> and `words`, in this order."""
    return TextTokenizer("word", word_pipeline([UNKNOWN_WORD, END_OF_LINE, *words]))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `tokenizer_config.json`, and for bpe, word and pretrained also `tokenizer.json`, into `folder`.

    Args:
        tokenizer: One of this package's tokenizers.
        folder: Folder to write into; created if missing.

    Raises:
        InputError: The tokenizer belongs to a class that this package cannot load.
        SaveError: A file could not be written.
    """
    folder = user_path(folder)
    config: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }
    if isinstance(tokenizer, DocumentEndTokenizer):
        config["end_of_document"] = True
    match plain(tokenizer):
        case PixelTokenizer(height=height, width=width):
            config |= {"height": height, "width": width}
        case BinTokenizer(definition=definition):
            config |= definition
        case TextTokenizer(tokenizer=definition) | PretrainedTokenizer(tokenizer=definition):
            write_bytes(folder / TOKENIZER_FILE, definition.to_str().encode())
        case ByteTokenizer():
            pass
        case _:
            raise InputError(
                f"tokenizer is {with_article(type(tokenizer).__name__)}; only this package's tokenizers can be saved"
            )
    # Written last, because its fingerprint shows whether the other file belongs to it.
    write_bytes(folder / _CONFIG_FILE, json.dumps(config, indent=2).encode())


def has_tokenizer(folder: Path) -> bool:
    """Return whether `folder` contains a tokenizer that `save_tokenizer` wrote."""
    return (folder / _CONFIG_FILE).exists()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save_tokenizer` wrote into `folder`, or the one of a folder that transformers wrote.

    Raises:
        CheckpointError: A file is missing or damaged, or has a kind or version that this package does not support.
    """
    folder = user_path(folder)
    path = folder / _CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if isinstance(config, dict) and "tokenizer_class" in config:
        return _read_from_transformers(folder / TOKENIZER_FILE)
    if not isinstance(config, dict) or config.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a tokenizer configuration of format version {_FORMAT_VERSION}")
    tokenizer = _build_tokenizer(config, folder)
    if config.get("end_of_document") is True and not isinstance(tokenizer, PixelTokenizer):
        tokenizer = DocumentEndTokenizer(tokenizer)
    if config.get("fingerprint") != tokenizer.fingerprint or config.get("vocab_size") != tokenizer.vocab_size:
        raise CheckpointError(
            f"{path} is damaged or belongs to another tokenizer: its fingerprint or vocab_size does not match"
        )
    return tokenizer


def _read_from_transformers(path: Path) -> Tokenizer:
    try:
        return from_tokenizer_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except InputError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _build_tokenizer(config: dict[str, Any], folder: Path) -> Tokenizer:
    match config:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "pixels", "vocab_size": int(levels), "height": int(height), "width": int(width)}:
            try:
                return PixelTokenizer(levels, height, width)
            except InputError as error:
                raise CheckpointError(f"{folder / _CONFIG_FILE} is damaged: {error}") from error
        case {"kind": "bins", "columns": list(columns), "edges": list(edges), "centres": list(centres)}:
            try:
                return BinTokenizer(columns, edges, centres, config.get("ranges"))
            except (InputError, TypeError, ValueError) as error:
                raise CheckpointError(f"{folder / _CONFIG_FILE} is damaged: {error}") from error
        case {"kind": "bpe" | "word" | "pretrained" as kind}:
            path = folder / TOKENIZER_FILE
            try:
                definition = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            # Checked before parsing: the package panics on some invalid definitions.
            fingerprint = fingerprint_of_text(kind, definition)
            if config.get("end_of_document") is True:
                fingerprint = fingerprint_with_end(fingerprint)
            if fingerprint != config.get("fingerprint"):
                raise CheckpointError(
                    f"{path} is damaged or was changed: its fingerprint does not match that in {_CONFIG_FILE}"
                )
            try:
                tokenizer = parse_definition(definition)
                return PretrainedTokenizer(tokenizer) if kind == "pretrained" else TextTokenizer(kind, tokenizer)
            except InputError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        case _:
            raise CheckpointError(
                f"{folder / _CONFIG_FILE} has kind {config.get('kind')!r}, which is unknown or lacks its fields"
            )
