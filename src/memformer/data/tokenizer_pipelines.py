"""The steps by which text tokenizers split a text, and the check that a tokenizer has exactly these steps."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from memformer.errors import InputError
from memformer.utils.checks import shown

UNKNOWN_WORD = "<unk>"
END_OF_LINE = "<eos>"

# Why a step must be as it is. A step that is not listed changes no id: decoding does not use the package.
_REASONS = {
    "model": "other models lose characters or draw tokens at random",
    "truncation": "it would cut documents",
    "padding": "it would add tokens to documents",
    "added_tokens": "they would be found across the ends of lines and could remove spaces",
    "normalizer": "another one would change the text",
    "pre_tokenizer": "another one would let tokens cross the ends of lines, or add spaces",
}


def bpe_pipeline() -> tokenizers.Tokenizer:
    """Return a tokenizer of kind bpe without vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # No piece crosses the end of a line, so that blocks of lines encode exactly as the whole text does.
    end_lines = pre_tokenizers.Split("\n", "merged_with_previous")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([end_lines, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_pipeline(words: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer of kind word with the given vocabulary."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_WORD))
    tokenizer.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def check_pipeline(kind: str, definition: str) -> None:
    """Check that a tokenizer has the steps and the tokens of its kind, whatever its vocabulary is.

    Args:
        kind: "bpe" or "word".
        definition: The tokenizer as JSON.

    Raises:
        InputError: A step differs, its ids are not contiguous, or a token that every text needs is missing.
    """
    found = json.loads(definition)
    vocabulary = found["model"].pop("vocab")
    expected = json.loads((bpe_pipeline() if kind == "bpe" else word_pipeline([UNKNOWN_WORD])).to_str())
    for model in (found["model"], expected["model"]):
        for name in ("vocab", "merges"):
            model.pop(name, None)
    for step, reason in _REASONS.items():
        if found.get(step) != expected[step]:
            raise InputError(
                f"tokenizer has {step} {shown(found.get(step))}; kind {kind!r} needs {shown(expected[step])}, "
                f"because {reason} (memformer.data.train_tokenizer makes such a tokenizer)"
            )
    needed = pre_tokenizers.ByteLevel.alphabet() if kind == "bpe" else [UNKNOWN_WORD, END_OF_LINE]
    if missing := sorted(set(needed) - set(vocabulary)):
        raise InputError(f"tokenizer of kind {kind!r} lacks tokens: {shown(missing)}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"tokenizer of kind {kind!r} lacks tokens: its ids are not contiguous")
