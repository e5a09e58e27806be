"""tokenizer.json: the `tokenizers` package gives the same ids as this package's tokenizers, and they are read back."""

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import CheckpointError, InputError
from memformer.data import (
    ByteTokenizer,
    DocumentEndTokenizer,
    PixelTokenizer,
    PretrainedTokenizer,
    document_end_of,
    from_tokenizer_json,
    load_tokenizer,
    to_tokenizer_json,
)
from memformer.data.tokenizer_json import BEGIN_TOKEN, END_TOKEN
from memformer.data.tokenizer_training import word_tokenizer
from tests.data.outside import byte_level, sentence_piece
from tests.data.test_tokenizers import BPE, WORD

PLAIN = {
    "bytes": ByteTokenizer(),
    "bpe": BPE,
    "word": WORD,
    "byte-level": PretrainedTokenizer(byte_level()),
    "SentencePiece": PretrainedTokenizer(sentence_piece()),
}
ALL = {**PLAIN, **{f"{name}, ended": DocumentEndTokenizer(tokenizer) for name, tokenizer in PLAIN.items()}}
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
# hypothesis also tries strings of the source code, some of which are special tokens: those become one id in the file.
TEXTS = st.text(CHARACTERS | st.sampled_from("the cat\n \r")).filter(lambda text: not re.search("<.+>", text))
each = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in ALL.items():
        to_tokenizer_json(tokenizer, folder / f"{name}.json", has_begin_token=True)
    return {name: folder / f"{name}.json" for name in ALL}


@pytest.fixture(scope="module")
def read(files):
    return {name: tokenizers.Tokenizer.from_file(str(file)) for name, file in files.items()}


@each
@settings(max_examples=50)
@given(text=TEXTS)
def test_the_package_gives_the_same_ids_for_any_text(read, name, text):
    ids = ALL[name].encode(text.encode(), "x").tolist()
    # No step adds a token, also if the caller does not ask for a text alone.
    assert read[name].encode(text).ids == ids
    assert read[name].decode(ids, skip_special_tokens=True) == ALL[name].decode(ids).decode()


@each
def test_special_tokens_have_the_ids_that_the_model_has_for_them(read, name):
    tokenizer, found = ALL[name], read[name]
    assert found.token_to_id(END_TOKEN) == document_end_of(tokenizer)
    assert found.token_to_id(BEGIN_TOKEN) == tokenizer.vocab_size == found.get_vocab_size() - 1
    ids = tokenizer.encode(b"the cat", "x").tolist()
    special = [tokenizer.vocab_size, *ids, *filter(None, [document_end_of(tokenizer)])]
    assert found.decode(special, skip_special_tokens=True) == tokenizer.decode(ids).decode()


@each
def test_the_file_is_read_back_as_the_same_tokenizer(files, name, tmp_path):
    definition = files[name].read_text(encoding="utf-8")
    for found in (from_tokenizer_json(definition), from_transformers_folder(tmp_path, definition)):
        assert (type(found), found.kind) == (type(ALL[name]), ALL[name].kind)
        assert document_end_of(found) == document_end_of(ALL[name])
        assert found.vocab_size == ALL[name].vocab_size
        text = "The cat\n\n \u00e4 sat \U0001f600".encode()
        assert found.encode(text, "x").tolist() == ALL[name].encode(text, "x").tolist()
        if "word" not in name:  # whose decoder the file adds
            assert found.fingerprint == ALL[name].fingerprint


def from_transformers_folder(folder, definition):
    """Return the tokenizer of a folder as transformers writes it."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    return load_tokenizer(folder)


def test_folders_of_transformers_without_a_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used: the tokenizers package cannot read it"):
        from_transformers_folder(tmp_path, "{}")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_the_format_cannot_hold_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="a tokenizer of kind 'pixels' cannot be a tokenizer.json, which is for texts"):
        to_tokenizer_json(PixelTokenizer(4, 2, 3), file)
    with pytest.raises(InputError, match=rf"cannot get the token {END_TOKEN.replace('|', '.')} with id 3: it has a"):
        to_tokenizer_json(DocumentEndTokenizer(word_tokenizer([END_TOKEN])), file)
    assert not file.exists()
