import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from memformer.data import (
    ByteTokenizer,
    Document,
    PixelTokenizer,
    SourceConfig,
    TextTokenizer,
    TokenizerConfig,
    iterate_documents,
    load_tokenizer,
    save_tokenizer,
    streaming,
    tokenizer_training,
    train_tokenizer,
)
from memformer.data import tokenizers as tokenizers_module
from memformer.data.streaming import encode_parts
from memformer.data.tokenizers import smallest_dtype
from memformer.errors import CheckpointError, InputError, SaveError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
TEXT = "the cat sat on the mat\n\nthe dog  sat on the log \n = the <unk> = \nÄpfel über 猫\n"
DOCUMENTS = [Document("a.txt", TEXT.encode()), Document("b.txt", b"the end of the cat")]

BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280), DOCUMENTS)
WORD = train_tokenizer(TokenizerConfig(kind="word"), DOCUMENTS)
ALL = {"bytes": ByteTokenizer(), "pixels": PixelTokenizer(4, 2, 3), "bpe": BPE, "word": WORD}


def test_bytes() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=256), [])
    assert (tokenizer.kind, tokenizer.vocab_size) == ("bytes", 256)
    assert tokenizer.encode(b"\x00a\xff", "x").tolist() == [0, 97, 255]
    assert tokenizer.decode([0, 97, 255]) == b"\x00a\xff"


@settings(max_examples=40)
@given(st.binary())
def test_byte_stream_is_the_text_with_replacements(content: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert "".join(tokenizer.decode_stream(content)) == content.decode("utf-8", errors="replace")


def test_byte_stream_waits_for_whole_characters() -> None:
    assert list(ByteTokenizer().decode_stream("aä!".encode())) == ["a", "ä", "!"]


def test_pixels() -> None:
    tokenizer = ALL["pixels"]
    assert (tokenizer.levels, tokenizer.vocab_size, tokenizer.height, tokenizer.width) == (4, 4, 2, 3)
    image = np.array([0, 1, 2, 3, 0, 1], np.uint8)
    assert tokenizer.encode(image, "x").tolist() == image.tolist()
    assert tokenizer.decode(image.tolist()) == image.tobytes()
    rows = "".join(tokenizer.decode_stream(image.tolist())).splitlines()
    assert [len(row) for row in rows] == [3, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([0, -1, 0, 0, 0, 0]), "document x has grey level -1; it must be from 0 to 3"),
        (np.full(6, 0.5), "document x has dtype float64; grey levels must be integers"),
        (b"text", "document x is text; the pixels tokenizer reads images"),
        (np.zeros(5, np.uint8), "document x has 5 pixels; the tokenizer's images have 2x3"),
        (np.full(6, 4, np.uint8), "document x has grey level 4; it must be from 0 to 3"),
    ],
)
def test_pixels_refuse_other_content(content, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ALL["pixels"].encode(content, "x")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "word"])
def test_texts_refuse_images(kind: str) -> None:
    with pytest.raises(InputError, match=f"document x is an image; a tokenizer of kind '{kind}' reads text"):
        ALL[kind].encode(np.zeros(6, np.uint8), "x")
    if kind != "bytes":
        with pytest.raises(InputError, match="document x is an image"):
            train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), [Document("x", np.zeros(6, np.uint8))])


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_bad_utf8_is_refused_by_offset(kind: str) -> None:
    message = r"document x is not UTF-8 at byte offset 3 \(0xff\)"
    with pytest.raises(InputError, match=message):
        ALL[kind].encode(b"abc\xff", "x")
    with pytest.raises(InputError, match=message):
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), [*DOCUMENTS, Document("x", b"abc\xff")])


@pytest.mark.parametrize("kind", ALL)
def test_ids_out_of_the_vocabulary_are_refused(kind: str) -> None:
    tokenizer = ALL[kind]
    for wrong in (-1, tokenizer.vocab_size):
        message = rf"token id \({wrong}\) must be from 0 to {tokenizer.vocab_size - 1}"
        with pytest.raises(InputError, match=message):
            tokenizer.decode([wrong])
        with pytest.raises(InputError, match=message):
            list(tokenizer.decode_stream([wrong]))


@settings(max_examples=40)
@given(st.text())
def test_bpe_restores_every_text(text: str) -> None:
    ids = BPE.encode(text.encode(), "x")
    assert ids.dtype == np.uint16
    assert BPE.decode(ids.tolist()) == text.encode()
    assert "".join(BPE.decode_stream(ids.tolist())) == text


def test_bpe_merges_and_respects_its_size() -> None:
    assert 257 <= BPE.vocab_size <= 280
    assert BPE.encode(b"the cat", "x").size < 7
    assert not BPE.encode(b"", "x").size


# Trained on text in which merges across line ends would save the most tokens.
LINES_BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [Document("x", b"a\n\n\n b\n\n\n\n" * 20)])


@settings(max_examples=40)
@given(st.text(alphabet="ab \n\r\tä", max_size=60), st.integers(1, 8))
def test_blocks_of_lines_change_no_id(text: str, size: int) -> None:
    tokenizers = LINES_BPE, WORD
    whole = [tokenizer.encode(text.encode(), "x").tolist() for tokenizer in tokenizers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_module, "_BLOCK_CHARACTERS", size)
        assert "".join(tokenizers_module.blocks_of_lines(text)) == text
        assert whole == [tokenizer.encode(text.encode(), "x").tolist() for tokenizer in tokenizers]


def outside(kind: str, change: Callable[[tokenizers.Tokenizer], object]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(ALL[kind].tokenizer.to_str())
    change(tokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["bpe", "word"])
@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda tokenizer: tokenizer.enable_truncation(3), "truncation {'direction"),
        (lambda tokenizer: tokenizer.enable_padding(length=9), "padding {'direction"),
        (lambda tokenizer: tokenizer.add_tokens(["the cat"]), r"added_tokens \[\{'content': 'the cat'"),
        (
            lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
            "normalizer {'type': 'Lowercase'",
        ),
        (
            lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "pre_tokenizer {'add_prefix_space': True",
        ),
    ],
)
def test_outside_tokenizers_that_change_the_text_are_refused(kind: str, change, step: str) -> None:
    """A tokenizer that would cut or change documents, or cross the ends of lines, is refused with the reason."""
    with pytest.raises(InputError, match=f"tokenizer has {step}.*; kind '{kind}' needs .*, because "):
        TextTokenizer(kind, outside(kind, change))


def test_outside_tokenizers_that_lose_characters_are_refused() -> None:
    """A tokenizer of kind bpe needs all bytes and no randomness; a tokenizer of another model is refused."""
    dropping, alphabet = json.loads(BPE.tokenizer.to_str()), json.loads(BPE.tokenizer.to_str())
    dropping["model"]["dropout"] = 0.5
    with pytest.raises(InputError, match="tokenizer has model .*; kind 'bpe' needs"):
        TextTokenizer("bpe", tokenizers.Tokenizer.from_str(json.dumps(dropping)))
    alphabet["model"]["vocab"]["long"] = alphabet["model"]["vocab"].pop("Ā")
    with pytest.raises(InputError, match=r"lacks tokens: \['Ā'\]"):
        TextTokenizer("bpe", tokenizers.Tokenizer.from_str(json.dumps(alphabet)))
    with pytest.raises(InputError, match="tokenizer has model .*; kind 'word' needs"):
        TextTokenizer("word", BPE.tokenizer)


def test_a_tokenizer_is_not_changed_through_the_one_it_was_made_from() -> None:
    """Switching on truncation after a tokenizer has been wrapped changes nothing."""
    given = outside("bpe", lambda _: None)
    wrapped = TextTokenizer("bpe", given)
    given.enable_truncation(1)
    assert wrapped.encode(TEXT.encode(), "x").tolist() == BPE.encode(TEXT.encode(), "x").tolist()
    assert wrapped.fingerprint == BPE.fingerprint


def test_words_follow_wikitext() -> None:
    ids = WORD.encode(TEXT.encode(), "x").tolist()
    expected = TEXT.replace("\n", " <eos> ").split()
    assert len(ids) == len(expected)
    assert WORD.vocab_size == len(set(expected) | {"end", "of"})
    assert WORD.decode(WORD.encode(b"the  zebra sat\n", "x").tolist()) == b"the <unk> sat\n"
    assert (
        "".join(WORD.decode_stream(ids))
        == "the cat sat on the mat\n\nthe dog sat on the log\n= the <unk> =\nÄpfel über 猫\n"
    )


def test_word_limit_keeps_the_most_frequent() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="word", vocab_size=3), DOCUMENTS)
    assert tokenizer.vocab_size == 3
    assert tokenizer.decode(tokenizer.encode(b"the cat\n", "x").tolist()) == b"the <unk>\n"


@pytest.mark.parametrize("config", [TokenizerConfig(kind="bpe", vocab_size=290), TokenizerConfig(kind="word")])
def test_training_is_deterministic_and_fingerprints_distinguish_tokenizers(config: TokenizerConfig) -> None:
    first, again = (train_tokenizer(config, DOCUMENTS) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    fingerprints = {tokenizer.fingerprint for tokenizer in ALL.values()} | {PixelTokenizer(4, 3, 2).fingerprint}
    assert len(fingerprints) == 5


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bytes", 300, r"vocab_size \(300\) must be 256 or not given"),
        ("bpe", None, r"vocab_size \(None\) must be given and at least 257"),
        ("bpe", 256, r"vocab_size \(256\) must be given and at least 257"),
        ("word", 2, r"vocab_size \(2\) must be at least 3"),
    ],
)
def test_wrong_configurations_are_refused(kind: str, vocab_size: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenizerConfig(kind=kind, vocab_size=vocab_size)


def test_unknown_kind_is_refused() -> None:
    # Avoids the type checker of the tests, which a user's program does not have.
    config = object.__new__(TokenizerConfig)
    object.__setattr__(config, "kind", "char")
    with pytest.raises(InputError, match=r"kind \('char'\) must be one of bytes, bpe, word, pretrained"):
        config.__post_init__()


@pytest.mark.parametrize("levels", [1, 257])
def test_wrong_images_are_refused(levels: int) -> None:
    with pytest.raises(InputError, match=rf"levels \({levels}\) must be"):
        PixelTokenizer(levels, 2, 2)
    with pytest.raises(InputError, match=r"height \(0\)"):
        PixelTokenizer(4, 0, 2)


def test_smallest_dtype() -> None:
    assert [smallest_dtype(size).itemsize for size in (1, 256, 257, 1 << 16, (1 << 16) + 1)] == [1, 1, 2, 2, 4]
    for size in (0, (1 << 32) + 1):
        with pytest.raises(InputError, match="vocab_size"):
            smallest_dtype(size)


@pytest.mark.parametrize("kind", ALL)
def test_saved_and_loaded_is_the_same(tmp_path: Path, kind: str) -> None:
    save_tokenizer(ALL[kind], tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert type(loaded) is type(ALL[kind])
    assert (loaded.kind, loaded.vocab_size, loaded.fingerprint) == (
        ALL[kind].kind,
        ALL[kind].vocab_size,
        ALL[kind].fingerprint,
    )
    content = np.arange(6, dtype=np.uint8) % 4 if kind == "pixels" else TEXT.encode()
    assert loaded.encode(content, "x").tolist() == ALL[kind].encode(content, "x").tolist()
    files = {"tokenizer_config.json"} | ({"tokenizer.json"} if kind in {"bpe", "word"} else set())
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == files


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for changes, message in (
        ({"kind": "char"}, "has kind 'char', which is unknown or lacks its fields"),
        ({"format_version": 9}, "is not a tokenizer configuration of format version 1"),
        ({"fingerprint": "0"}, "its fingerprint does not match that in tokenizer_config.json"),
        ({"kind": "pixels"}, "lacks its fields"),
        ({"kind": "pixels", "vocab_size": 1, "height": 1, "width": 1}, r"is damaged: levels \(1\)"),
        ({"kind": "bytes"}, "its fingerprint or vocab_size does not match"),
    ):
        save_tokenizer(WORD, tmp_path)
        edit(config, **changes)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_damaged_definitions_are_refused(tmp_path: Path, kind: str) -> None:
    save_tokenizer(ALL[kind], tmp_path)
    path = tmp_path / "tokenizer.json"
    good = path.read_text(encoding="utf-8")
    other = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=270), [Document("x", b"other words here")])
    wrong_kind = ALL["word" if kind == "bpe" else "bpe"].tokenizer.to_str()
    for damaged in (other.tokenizer.to_str(), good[:-20], "{}", wrong_kind):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged or was changed"):
            load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_foreign_tokenizers_and_unwritable_folders_are_refused(tmp_path: Path) -> None:
    class Foreign(ByteTokenizer):
        pass

    class Other:
        kind = "other"
        vocab_size = 3
        fingerprint = "0"
        encode = decode = decode_stream = list

    save_tokenizer(Foreign(), tmp_path)
    with pytest.raises(InputError, match="tokenizer is an Other; only this package's tokenizers can be saved"):
        save_tokenizer(Other(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="could not be written"):
        save_tokenizer(ByteTokenizer(), tmp_path / "file")


@pytest.mark.data
def test_wikitext_2_has_its_published_vocabulary() -> None:
    path = REAL_DATA / "wikitext-2" / "train.txt.xz"
    if not path.exists():
        pytest.skip("WikiText-2 is not beside the checkout")
    tokenizer = train_tokenizer(TokenizerConfig(kind="word"), iterate_documents(SourceConfig(path=str(path))))
    assert isinstance(tokenizer, TextTokenizer)
    assert tokenizer.vocab_size == 33_278
    (valid,) = iterate_documents(SourceConfig(path=str(path.with_name("valid.txt"))))
    assert tokenizer.encode(valid.content, valid.name).size == 217_646


@settings(max_examples=60)
@given(
    text=st.text("ab \n\r\u00e9", max_size=60), size=st.integers(1, 20), kind=st.sampled_from(["bytes", "bpe", "word"])
)
def test_a_stream_read_in_parts_has_the_ids_of_the_whole(text: str, size: int, kind: str) -> None:
    tokenizer = {"bytes": ByteTokenizer(), "bpe": LINES_BPE, "word": WORD}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "STREAM_BLOCK_BYTES", size)
        parts = [ids for _, ids in encode_parts(tokenizer, io.BytesIO(text.encode()), name="a")]
    whole = tokenizer.encode(text.encode(), "a").tolist() if text else []
    assert [token for part in parts for token in part.tolist()] == whole


def test_bytes_of_a_stream_are_never_held_all_at_once() -> None:
    stream = io.BytesIO(bytes(3 * streaming.STREAM_BLOCK_BYTES + 1))
    parts = encode_parts(ByteTokenizer(), stream, name="a")
    assert [len(ids) for _, ids in parts] == [streaming.STREAM_BLOCK_BYTES] * 3 + [1]


def test_bad_utf8_in_a_later_part_of_a_stream_is_refused_by_offset(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "STREAM_BLOCK_BYTES", 4)
    parts = (ids for _, ids in encode_parts(BPE, io.BytesIO(b"aa\nbb\xff\n"), name="a"))
    assert len(next(parts)) > 0
    with pytest.raises(InputError, match=r"document a, from byte 3 on, is not UTF-8 at byte offset 2 \(0xff\)"):
        next(parts)


@given(st.lists(st.text("ab \n", max_size=40), max_size=6), st.integers(1, 9))
def test_long_words_are_cut_for_learning_and_nothing_else_is(texts, longest):
    """Learning is quadratic in the length of a word; texts without long words are learned from as they are."""
    text = "".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_training, "_LONG_WORD", re.compile(rf"\S{{{longest}}}"))
        parts = list(tokenizer_training._without_long_words(text))
    assert "".join(parts) == text
    assert max(map(len, re.findall(r"\S+", " ".join(parts))), default=0) <= longest
    if max(map(len, text.split()), default=0) < longest:
        assert parts == [text]
