"""Tokenizers made elsewhere: they restore every text, or are refused in one sentence."""

import io
import json

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from memformer import CheckpointError, InputError
from memformer.data import (
    DocumentEndTokenizer,
    PretrainedTokenizer,
    SourceConfig,
    TokenizerConfig,
    build_corpus,
    load_tokenizer,
    read_outside_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from memformer.data.outside_tokenizers import decode_after, encode_after
from memformer.data.streaming import encode_parts
from tests.data.outside import byte_level, sentence_piece, word_piece

OUTSIDE = {"byte-level": byte_level(), "SentencePiece": sentence_piece()}
WRAPPED = {name: PretrainedTokenizer(tokenizer) for name, tokenizer in OUTSIDE.items()}
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXTS = st.text(CHARACTERS | st.sampled_from("the cat\n \u00e9"))
each = pytest.mark.parametrize("name", OUTSIDE)


@each
@settings(max_examples=60)
@given(text=TEXTS)
def test_every_text_is_restored_from_the_ids_of_the_package(name, text):
    tokenizer = WRAPPED[name]
    ids = tokenizer.encode(text.encode(), "x").tolist()
    assert ids == OUTSIDE[name].encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text.encode()
    assert "".join(tokenizer.decode_stream(ids)) == text


@each
@settings(max_examples=60)
@given(text=TEXTS, data=st.data())
def test_a_text_that_goes_on_joins_that_before_it(name, text, data):
    tokenizer = WRAPPED[name]
    ids = tokenizer.encode(text.encode(), "x").tolist()
    cut = data.draw(st.integers(0, len(ids)))
    before = "".join(tokenizer.decode_stream(ids[:cut]))
    assume(text.startswith(before))  # no cut within a character
    assert before + "".join(decode_after(tokenizer, ids[:cut], ids[cut:])) == text


@each
@settings(max_examples=60)
@given(before=TEXTS, after=TEXTS)
def test_the_ids_of_a_text_that_goes_on_add_nothing_to_it(name, before, after):
    """A SentencePiece tokenizer puts a space before a text, which is none within a stream."""
    tokenizer = WRAPPED[name]
    assume(before)
    first, more = tokenizer.encode(before.encode(), "x"), encode_after(tokenizer, after.encode(), "x")
    assert tokenizer.decode([*first.tolist(), *more.tolist()]) == (before + after).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [("say ``hi", "changes 'say ``hi' at character 4 to 'say \"hi'"), ("a\n\n\n\nb", "changes .* at character 3")],
)
def test_a_text_that_a_normalizer_changes_is_refused(text, message):
    """No list of texts that are tried at first has every rule of a normalizer."""
    tokenizer = byte_level()
    rules = [("``", '"'), (tokenizers.Regex("\n{3,}"), "\n\n")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(*rule) for rule in rules])
    wrapped = PretrainedTokenizer(tokenizer)
    with pytest.raises(InputError, match=f"document x cannot be read: its tokenizer {message}"):
        wrapped.encode(text.encode(), "x")
    assert wrapped.decode(wrapped.encode(b"say 'hi'", "x")) == b"say 'hi'"


def test_the_unknown_token_in_a_text_is_no_unknown_text():
    """The space that is added behind it is the reason."""
    tokenizer = sentence_piece()
    tokenizer.add_special_tokens(["<unk>"])
    with pytest.raises(InputError, match="the tokenizer changes texts: 'a <unk> b<unk>c' becomes"):
        PretrainedTokenizer(tokenizer)


@each
@settings(max_examples=40)
@given(data=st.data())
def test_any_ids_have_a_text_that_a_stream_gives_too(name, data):
    tokenizer = WRAPPED[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    text, streamed = tokenizer.decode(ids).decode("utf-8", errors="replace"), "".join(tokenizer.decode_stream(ids))
    # With byte fallback, the package gives up characters beside bytes that are none, even those given before.
    assert streamed == text or ("\ufffd" in text and name == "SentencePiece")
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=rf"token id \({wrong}\) must be from 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])


@each
def test_a_stream_gives_the_ids_of_the_whole_text(name, monkeypatch, tmp_path):
    """Tokens may cross the ends of lines, so a text is never cut, however long it is."""
    monkeypatch.setattr("memformer.data.streaming.STREAM_BLOCK_BYTES", 5)
    text = "the cat\n\n\n  sat\n\n" * 7
    expected = OUTSIDE[name].encode(text, add_special_tokens=False).ids
    ((_, part),) = encode_parts(WRAPPED[name], io.BytesIO(text.encode()), name="x")
    assert part.tolist() == expected
    (tmp_path / "text.txt").write_text(text)
    source = SourceConfig(kind="text", path=str(tmp_path / "text.txt"))
    corpus = build_corpus(source, DocumentEndTokenizer(WRAPPED[name]), cache=tmp_path / "cache")
    assert corpus.document(0).tolist() == [*expected, WRAPPED[name].vocab_size]


def test_a_stream_yields_characters_as_soon_as_they_are_complete():
    tokenizer = WRAPPED["SentencePiece"]
    ids = tokenizer.encode("a \U0001f600 cat".encode(), "x").tolist()
    assert list(tokenizer.decode_stream(ids)) == ["a", " ", "\U0001f600", " ", "c", "a", "t"]


def test_a_space_mark_in_a_text_is_refused_only_where_it_would_be_lost():
    with pytest.raises(InputError, match=r"document x has the character U\+2581, which its tokenizer reads as a space"):
        WRAPPED["SentencePiece"].encode("a\u2581b".encode(), "x")
    tokenizer = WRAPPED["byte-level"]
    assert tokenizer.decode(tokenizer.encode("a\u2581b".encode(), "x").tolist()).decode() == "a\u2581b"


def changed(change, make=byte_level):
    tokenizer = make()
    change(tokenizer)
    return tokenizer


def with_dropout():
    fields = json.loads(byte_level().to_str())
    fields["model"]["dropout"] = 0.1
    return tokenizers.Tokenizer.from_str(json.dumps(fields))


BEGIN = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
REFUSED = {
    "truncation": (
        lambda: changed(lambda t: t.enable_truncation(5)),
        "has truncation, which would cut documents; set truncation to null in tokenizer.json",
    ),
    "padding": (
        lambda: changed(lambda t: t.enable_padding(length=5)),
        "has padding, which would add tokens to documents; set padding to null",
    ),
    "dropout": (with_dropout, r"model has dropout \(0.1\), which draws tokens at random"),
    "post-processor": (
        lambda: changed(lambda t: setattr(t, "post_processor", BEGIN)),
        r"post_processor adds tokens to every text \(<\|endoftext\|>\); set post_processor to null",
    ),
    "lower case": (
        lambda: changed(lambda t: setattr(t, "normalizer", normalizers.Lowercase())),
        "changes texts: 'T' becomes 't', probably because of its normalizer Lowercase",
    ),
    "composition": (
        lambda: changed(lambda t: setattr(t, "normalizer", normalizers.NFC())),
        r"changes texts: '\\xe9 e\\u0301 .*' becomes '\\xe9 \\xe9 .*', probably because of its normalizer NFC",
    ),
    "space before": (
        lambda: changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "changes texts: 't' becomes ' t', probably because of its pre_tokenizer or decoder",
    ),
    "token that eats spaces": (
        lambda: changed(lambda t: t.add_tokens([AddedToken("<mask>", lstrip=True)])),
        "changes texts: 'a <mask> b<mask>c' becomes 'a<mask> b<mask>c'",
    ),
    "no byte fallback": (
        lambda: sentence_piece(byte_fallback=False),
        "has no tokens for 'T', which would be lost; it needs byte-level tokens or byte fallback",
    ),
    "BERT": (word_piece, "has no tokens for 'T', which would be lost"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_tokenizers_that_would_change_texts_are_refused(reason, tmp_path):
    make, message = REFUSED[reason]
    tokenizer = make()
    with pytest.raises(InputError, match=f"^the tokenizer('s)? {message}"):
        PretrainedTokenizer(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=f"tokenizer.json cannot be used: the tokenizer('s)? {message}") as raised:
        read_outside_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_is_read_from_a_file_or_its_folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert read_outside_tokenizer(path).fingerprint == WRAPPED["byte-level"].fingerprint
    config = TokenizerConfig(kind="pretrained", path=str(tmp_path))
    assert train_tokenizer(config, []).fingerprint == WRAPPED["byte-level"].fingerprint
    for content, message in (("{}", "cannot be used: the tokenizers package cannot read it"), ("\xff", "cannot be")):
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=message):
            read_outside_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nothing cannot be read: No such file"):
        read_outside_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "pretrained"}, "path must be given for kind 'pretrained'"),
        ({"kind": "pretrained", "path": "x", "vocab_size": 300}, r"vocab_size \(300\) is not for kind 'pretrained'"),
        ({"kind": "bpe", "vocab_size": 300, "path": "x"}, r"path \('x'\) is for tokenizers of kind 'pretrained', not"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**fields)


@each
def test_a_run_folder_holds_the_whole_tokenizer(name, tmp_path):
    for tokenizer in (WRAPPED[name], DocumentEndTokenizer(WRAPPED[name])):
        save_tokenizer(tokenizer, tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert (loaded.kind, loaded.vocab_size) == ("pretrained", tokenizer.vocab_size)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(b"the cat", "x").tolist() == tokenizer.encode(b"the cat", "x").tolist()
    (tmp_path / "tokenizer.json").write_text(OUTSIDE["byte-level"].to_str().replace("true", "false", 1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged or was changed"):
        load_tokenizer(tmp_path)
