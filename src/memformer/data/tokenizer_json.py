"""Tokenizers as tokenizer.json, the format of the `tokenizers` package and of transformers, in both directions."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from memformer.data.document_end import DocumentEndTokenizer, plain
from memformer.data.outside_tokenizers import PretrainedTokenizer, parse_definition
from memformer.data.tokenizer_pipelines import END_OF_LINE
from memformer.data.tokenizers import BYTE_OF_CHARACTER, ByteTokenizer, TextTokenizer, Tokenizer
from memformer.errors import InputError
from memformer.utils.files import user_path, write_text

END_TOKEN = "<|endofdocument|>"
BEGIN_TOKEN = "<|beginofdocument|>"
# The steps that decide the ids of a text.
_STEPS = ("truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "model")


def to_tokenizer_json(tokenizer: Tokenizer, file: str | Path, *, has_begin_token: bool = False) -> None:
    """Write a text tokenizer as a file that `tokenizers.Tokenizer.from_file` reads, with the same ids for any text.

    The format knows texts only, so bytes that are not UTF-8 are out of its reach. An end-of-document token becomes the
    special token `END_TOKEN`; a text that contains these very characters is then read as that token.

    Args:
        tokenizer: One of this package's tokenizers.
        file: The file.
        has_begin_token: Add the special token `BEGIN_TOKEN` with the id after the last one, which is that of a model's
            `[BOS]`.

    Raises:
        InputError: The tokenizer reads images or is not one of this package's, or it has these tokens already.
        SaveError: The file cannot be written.
    """
    write_text(user_path(file), as_tokenizer_json(tokenizer, has_begin_token=has_begin_token).to_str(pretty=True))


def as_tokenizer_json(tokenizer: Tokenizer, *, has_begin_token: bool = False) -> tokenizers.Tokenizer:
    """Return what `to_tokenizer_json` writes.

    Raises:
        InputError: As `to_tokenizer_json`.
    """
    match plain(tokenizer):
        case ByteTokenizer():
            result = _byte_level()
        case TextTokenizer(kind="word", tokenizer=inner):
            result = tokenizers.Tokenizer.from_str(inner.to_str())
            result.decoder = _word_decoder()
        case TextTokenizer(tokenizer=inner) | PretrainedTokenizer(tokenizer=inner):
            result = tokenizers.Tokenizer.from_str(inner.to_str())
        case _:
            raise InputError(f"a tokenizer of kind {tokenizer.kind!r} cannot be a tokenizer.json, which is for texts")
    tokens = [END_TOKEN] if isinstance(tokenizer, DocumentEndTokenizer) else []
    tokens += [BEGIN_TOKEN] if has_begin_token else []
    for token_id, token in enumerate(tokens, start=plain(tokenizer).vocab_size):
        result.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if result.token_to_id(token) != token_id:
            raise InputError(
                f"the tokenizer cannot get the token {token} with id {token_id}: it has a token of this name already, "
                "or its ids have gaps"
            )
    return result


def from_tokenizer_json(definition: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json: one of this package that `to_tokenizer_json` wrote, or an outside one.

    Args:
        definition: Content of the file.

    Raises:
        InputError: The `tokenizers` package cannot read it, the tokenizer would cut or change texts, or tokens were
            added behind those of `to_tokenizer_json`.
    """
    fields = json.loads(parse_definition(definition).to_str())
    added = fields["added_tokens"]
    own = [token for token in added if token["content"] in {BEGIN_TOKEN, END_TOKEN}]
    fields["added_tokens"] = [token for token in added if token not in own]
    given = parse_definition(json.dumps(fields))
    for token in fields["added_tokens"]:
        if given.token_to_id(token["content"]) != token["id"]:
            raise InputError(
                f"the tokenizer has the added token {token['content']} with id {token['id']}, behind "
                f"{' and '.join(each['content'] for each in own)}, which are no tokens of a text; without them its id "
                f"would be {given.token_to_id(token['content'])}"
            )
    inner = _identify(fields)
    has_end = any(token["content"] == END_TOKEN and token["id"] == inner.vocab_size for token in own)
    return DocumentEndTokenizer(inner) if has_end else inner


def _identify(fields: dict[str, Any]) -> Tokenizer:
    given = parse_definition(json.dumps(fields))
    byte_level = json.loads(_byte_level().to_str())
    if all(fields[step] == byte_level[step] for step in _STEPS):
        return ByteTokenizer()
    for kind in ("bpe", "word"):
        try:
            return TextTokenizer(kind, given)
        except InputError:
            continue
    return PretrainedTokenizer(given)


def _byte_level() -> tokenizers.Tokenizer:
    """Return the tokenizer whose ids are the bytes of a text: byte-level BPE without merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=BYTE_OF_CHARACTER, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_decoder() -> decoders.Decoder:
    """Return the decoder that puts one space between words, and an end of line for `<eos>`."""
    spaces = decoders.WordPiece(prefix="\0", cleanup=False)  # no word begins with this prefix
    ends = decoders.Replace(tokenizers.Regex(f"(?:^| |(?<= )){END_OF_LINE}(?: |$)"), "\n")
    return decoders.Sequence([spaces, decoders.Fuse(), ends])
