"""Parts of a text: their tokens are those of the whole text, and each token has the line in which it begins."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import InputError
from memformer.data import (
    ByteTokenizer,
    Document,
    DocumentEndTokenizer,
    PretrainedTokenizer,
    TokenizerConfig,
    train_tokenizer,
)
from memformer.data import lines as lines_module
from memformer.data.lines import LineReader
from memformer.data.streaming import whole_lines
from tests.data.outside import CORPUS, byte_level, sentence_piece

DOCUMENTS = [Document("corpus", "\n".join(CORPUS).encode())]
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "bpe": train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), DOCUMENTS),
    "word": train_tokenizer(TokenizerConfig(kind="word"), DOCUMENTS),
    "pretrained": PretrainedTokenizer(byte_level()),
    "pretrained, sentence piece": PretrainedTokenizer(sentence_piece()),
    "bytes with ends of documents": DocumentEndTokenizer(ByteTokenizer()),
}
pieces = st.sampled_from(["the", " cat", " ", "\n", "\n\n", "\r\n", "\t", "\u65e5\u672c", "<eos>", "123"])
texts = st.lists(pieces, max_size=20).map("".join)


class Pipe(io.BytesIO):
    """A stream from which every read returns as many bytes as a writer wrote at once."""

    def __init__(self, content, sizes):
        super().__init__(content)
        self.sizes = iter(sizes)

    def read1(self, size=-1):
        return super().read1(next(self.sizes, size))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(lines_module, "_PART_TOKENS", 5)


def joined(parts):
    """Return content, token ids, and the line of each token in the whole text."""
    content, ids, line_numbers = b"", [], []
    for part in parts:
        line_numbers += (part.lines + content.count(b"\n")).tolist()
        content += part.content
        ids += part.token_ids.tolist()
        assert len(part.lines) == len(part.token_ids)
    return content, ids, line_numbers


def expected_lines(kind, tokenizer, content, ids):
    """Return the line of each token, from the position of its first byte (of words: from their number in each line)."""
    if kind == "word":
        ended = [line.endswith(b"\n") for line in io.BytesIO(content)]
        counts = [len(line.split()) + end for line, end in zip(io.BytesIO(content), ended, strict=True)]
        return np.repeat(range(len(counts)), counts).tolist()
    ends = np.cumsum([len(tokenizer.decode([token])) for token in ids])
    return [content[:end].count(b"\n") for end in [0, *ends[:-1]]] if ids else []


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(text=texts, sizes=st.lists(st.integers(1, 9)))
def test_parts_are_those_of_the_whole_text_for_any_split(kind, text, sizes):
    tokenizer, content = TOKENIZERS[kind], text.encode()
    reader = LineReader(tokenizer, Pipe(content, sizes), name="text")
    found, ids, line_numbers = joined(reader.parts())
    assert (found, reader.held, reader.num_bytes_read) == (content, b"", len(content))
    assert ids == tokenizer.encode(content, "text").tolist()
    if kind != "pretrained, sentence piece":  # whose tokens have no bytes of their own
        assert line_numbers == expected_lines(kind, tokenizer, content, ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "word"])
@settings(max_examples=60)
@given(text=texts, data=st.data())
def test_a_text_in_two_streams_is_read_like_one(kind, text, data):
    """Wherever it is cut: the beginning of a line waits for its end where its tokens depend on it."""
    content = text.encode()
    cut = data.draw(st.integers(0, len(content)))
    first = LineReader(TOKENIZERS[kind], io.BytesIO(content[:cut]), name="first")
    parts = [*first.parts(ends_line=False)]
    second = LineReader(TOKENIZERS[kind], io.BytesIO(content[cut:]), name="second", held=first.held)
    parts += second.parts()
    whole = LineReader(TOKENIZERS[kind], io.BytesIO(content), name="whole")
    assert joined(parts) == joined(whole.parts())
    assert (kind == "bytes") <= (first.held == b"")


@given(text=texts, data=st.data())
def test_a_begun_line_of_an_outside_tokenizer_waits_for_its_end(text, data):
    """Its tokens are those of whole lines; only tokens that cross the end of the line of the cut are others."""
    content, tokenizer = text.encode(), TOKENIZERS["pretrained"]
    cut = content.decode()[: data.draw(st.integers(0, len(text)))].encode()
    lines = cut[: cut.rfind(b"\n") + 1]
    first = LineReader(tokenizer, io.BytesIO(cut), name="first")
    parts = [*first.parts(ends_line=False)]
    assert first.held == cut[len(lines) :]
    second = LineReader(tokenizer, io.BytesIO(content[len(cut) :]), name="second", held=first.held)
    found, ids, _ = joined([*parts, *second.parts()])
    expected = [tokenizer.encode(part, "").tolist() if part else [] for part in (lines, content[len(lines) :])]
    assert (found, ids) == (content, expected[0] + expected[1])


def test_a_token_across_the_end_of_a_line_belongs_to_the_line_in_which_it_begins():
    tokenizer = PretrainedTokenizer(byte_level())
    content = b"the mat.\n\n the"
    _, ids, line_numbers = joined(LineReader(tokenizer, io.BytesIO(content), name="text").parts())
    pieces = [tokenizer.decode([token]) for token in ids]
    crossing = next(index for index, piece in enumerate(pieces) if b"\n" in piece[:-1] or piece == b"\n\n")
    assert line_numbers[crossing] == 0
    assert line_numbers[crossing + 1 :]
    assert set(line_numbers[crossing + 1 :]) == {2}


def test_subwords_are_yielded_as_soon_as_their_line_has_ended():
    reader = LineReader(TOKENIZERS["bpe"], Pipe(b"the\nca t\nthe", [6, 3]), name="text")
    parts = reader.parts()
    assert next(parts).content == b"the\n"
    assert reader.num_bytes_read == 6
    assert next(parts).content == b"ca t\n"
    assert [part.content for part in parts] == [b"the"]


def test_a_tokenizer_that_hides_ends_of_lines_is_refused():
    class Hiding(PretrainedTokenizer):
        def decode(self, ids):
            return super().decode(ids).replace(b"\n", b" ")

    reader = LineReader(Hiding(byte_level()), io.BytesIO(b"a\nb\n"), name="notes.txt")
    with pytest.raises(InputError, match=r"notes.txt cannot be scored by line: the tokens .* hold 0 ends .* text 2"):
        list(reader.parts())


def test_a_refused_line_is_named_by_its_number():
    text = b"the cat\nthe\n\xff\n"
    for sizes in ([6, 3, 100], [100]):
        parts = LineReader(TOKENIZERS["bpe"], Pipe(text, sizes), name="notes").parts()
        with pytest.raises(InputError, match=r"notes, line 3 is not UTF-8 at byte offset 0"):
            list(parts)


@given(st.lists(st.binary(max_size=6).map(lambda block: block.replace(b"x", b"\n")), max_size=12))
def test_whole_lines_are_yielded_when_their_ends_arrive(blocks):
    parts = list(whole_lines(blocks))
    assert b"".join(parts) == b"".join(blocks)
    assert all(part.endswith(b"\n") for part in parts[:-1])
    assert len(parts) == sum(b"\n" in block for block in blocks) + (b"".join(blocks)[-1:] not in (b"", b"\n"))
