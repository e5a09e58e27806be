"""Tokenizers of the library as those of transformers; pipelines that use them."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import AutoTokenizer, DataCollatorForLanguageModeling, pipeline

from memformer import CheckpointError, InputError, Memformer, Session, hf
from memformer.data import (
    ByteTokenizer,
    Document,
    DocumentEndTokenizer,
    PixelTokenizer,
    TokenizerConfig,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from memformer.hf import tokenization
from tests.helpers import tiny_config

TEXT = "the cat sat on a mat\nwhile dogs ran  on\n\nand é 猫\n"


def make(kind):
    name = kind.split(",")[0]
    config = TokenizerConfig(kind=name, vocab_size={"bytes": None, "bpe": 270, "word": 20}[name])
    tokenizer = train_tokenizer(config, [Document("text", TEXT.encode() * 3)])
    return DocumentEndTokenizer(tokenizer) if "end" in kind else tokenizer


@pytest.mark.parametrize("kind", ["bytes", "bytes, end", "bpe", "bpe, end", "word", "word, end"])
def test_a_saved_tokenizer_is_read_by_both_with_the_same_ids(kind, tmp_path):
    tokenizer = make(kind)
    Memformer(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    for _ in range(2):  # as the library wrote it, and as transformers did
        found = AutoTokenizer.from_pretrained(tmp_path)
        expected = tokenizer.encode(TEXT.encode(), "text").tolist()
        assert found(TEXT).input_ids == expected
        assert set(found(TEXT)) == {"input_ids", "attention_mask"}
        assert found.decode(expected).encode() == tokenizer.decode(expected)
        assert found.bos_token_id == found.pad_token_id == tokenizer.vocab_size
        assert found.eos_token_id == (tokenizer.vocab_size - 1 if "end" in kind else None)
        assert len(found) == tokenizer.vocab_size + 1
        again = load_tokenizer(tmp_path)
        assert (again.kind, again.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
        assert again.encode(TEXT.encode(), "text").tolist() == expected
        found.save_pretrained(tmp_path)


def test_names_of_special_tokens_can_be_read_as_text(tmp_path):
    tokenizer = make("bytes, end")
    text = "a <|endofdocument|> and a <|beginofdocument|>"
    hf.as_hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    for found in (hf.as_hf_tokenizer(tokenizer), AutoTokenizer.from_pretrained(tmp_path)):
        expected = tokenizer.encode(text.encode(), "text").tolist()
        assert found(text, split_special_tokens=True).input_ids == expected
        assert found(text).input_ids.count(found.eos_token_id) == found(text).input_ids.count(found.bos_token_id) == 1


def test_arguments_of_transformers_are_read(tmp_path, monkeypatch):
    tokenizer = make("bytes")
    Memformer(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    found = AutoTokenizer.from_pretrained(tmp_path, padding_side="right", pad_token="Z", chat_template="hi")
    assert (found.padding_side, found.pad_token_id, found.chat_template) == ("right", ord("Z"), "hi")
    text = "ab<|endofdocument|>"
    save_tokenizer(make("bytes, end"), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == [97, 98, 256]
    found = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True, model_input_names=["input_ids"])
    assert found(text) == {"input_ids": list(text.encode())}
    with pytest.raises(ValueError, match="padding_side|Padding side"):
        AutoTokenizer.from_pretrained(tmp_path, padding_side="middle")
    asked = []
    monkeypatch.setattr(tokenization, "find_model_folder", lambda name: asked.append(name) or tmp_path)
    tokenization.MemformerTokenizer.from_pretrained("owner/name", revision="v1")
    tokenization.MemformerTokenizer.from_pretrained("owner/name")
    tokenization.MemformerTokenizer.from_pretrained(str(tmp_path), revision="v1")
    assert asked == ["owner/name@v1", "owner/name", str(tmp_path)]


def test_tokens_added_behind_the_special_ones_are_refused_instead_of_renumbered(tmp_path):
    found = hf.as_hf_tokenizer(make("bytes, end"))
    found.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    found.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"added token <\|user\|> with id 258.*without them its id would be 256"):
        load_tokenizer(tmp_path)


def test_tokenizers_without_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match="'pixels' cannot be a tokenizer.json"):
        hf.as_hf_tokenizer(PixelTokenizer(8, 4, 4))
    Memformer(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json cannot be read"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_pipeline_continues_several_prompts_as_sessions_do():
    core = Memformer(tiny_config(vocab_size=256)).eval()
    generate = pipeline(
        "text-generation", model=hf.as_causal_lm(core), tokenizer=hf.as_hf_tokenizer(ByteTokenizer()), batch_size=3
    )
    prompts = ["a", "the cat sat", "on é"]
    for prompt, found in zip(prompts, generate(prompts, max_new_tokens=9, do_sample=False), strict=True):
        session = Session(core)
        session.feed(list(prompt.encode()))
        new = bytes(session.generate(9, temperature=0))
        assert found[0]["generated_text"] == prompt + new.decode(errors="replace")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_the_collator_of_transformers_train(side):
    tokenizer = hf.as_hf_tokenizer(ByteTokenizer())
    tokenizer.padding_side = side
    model = hf.as_causal_lm(Memformer(tiny_config(vocab_size=256)).double()).eval()
    rows = [tokenizer(text) for text in ("the cat sat on a mat", "dogs")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    scores = [Session(model.memformer).score(row.input_ids) for row in rows]
    # In a row that is padded on the left, the first token is predicted too: padding stands before it.
    counted = [scores[0][1:], scores[1] if side == "left" else scores[1][1:]]
    assert model(**batch).loss.item() == pytest.approx(float(torch.cat(counted).mean()), rel=1e-10)
