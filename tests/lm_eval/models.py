"""Tiny models of bytes in folders, and requests of the harness."""

from types import SimpleNamespace

from memformer.data import ByteTokenizer, DocumentEndTokenizer, save_tokenizer
from tests.helpers import tiny_model
from tests.models.baselines import tiny_baseline

LENGTH = 24  # of a segment
TEXT = (
    "The ship was old, and nobody knew how old. Its captain, a woman named Orla, had once said\n"
    "that ships forget their age – as people do. é ü ß. “Why?” asked the boy.   Nobody answered him."
)


def save(folder, *, baseline=None, ends=False, segment_length=LENGTH):
    """Save a tiny model of bytes with its tokenizer; return the folder as text."""
    tokenizer = DocumentEndTokenizer(ByteTokenizer()) if ends else ByteTokenizer()
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1} if baseline is None else {"num_layers": 1}
    fields = {**layers, "vocab_size": tokenizer.vocab_size, "segment_length": segment_length}
    model = tiny_model(**fields) if baseline is None else tiny_baseline(baseline, **fields)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


def requests_of(*arguments):
    return [SimpleNamespace(args=item if isinstance(item, tuple) else (item,)) for item in arguments]
