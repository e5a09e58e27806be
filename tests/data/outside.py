"""Tokenizers as other projects make them: byte-level BPE, SentencePiece-like BPE with byte fallback, and BERT's."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the cat sat on the mat. don't 123 \u00c4pfel \u65e5\u672c \n\n the"] * 10


def byte_level():
    """Return a tokenizer like GPT-2's, whose tokens cross the ends of lines."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentence_piece(*, byte_fallback=True):
    """Return a tokenizer like Llama's first, which puts a space before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *"\u2581thecaosnm", "\u2581t"])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[("\u2581", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_piece():
    """Return a tokenizer like BERT's, which loses case, accents and spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
