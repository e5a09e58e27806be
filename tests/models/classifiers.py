"""Small classifiers, and documents with labels."""

import dataclasses

import torch

from memformer import MemformerClassificationConfig, MemformerForSequenceClassification
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, tiny_config

NUM_LABELS = 3
LENGTHS = (1, 2 * SEGMENT_LENGTH, 3 * SEGMENT_LENGTH + 2)

# Every option of the encoder and the memory, and every option of the head.
CLASSIFIERS = {
    **{name: fields for name, fields in VARIANTS.items() if not any("decoder" in key for key in fields)},
    "last": {"pooling": "last"},
    "memory": {"pooling": "memory"},
    "narrow memory": {"pooling": "memory", "slot_width": 4},
    "segments": {"label_unit": "segment"},
    "segments, memory": {"label_unit": "segment", "pooling": "memory", "write_normalizer": "entmax15"},
    "all options": {"positions": "relative", "convolution_kernel": 3, "pooling": "last"},
}

# One of each kind, for laws that the options of encoder and memory cannot break one by one.
SOME = {
    name: CLASSIFIERS[name]
    for name in (
        "default",
        "without memory",
        "competing slots, shared",
        "forgetting when written",
        "position embedding",
        "adaptive softmax",
        "segments, memory",
        "narrow memory",
        "all options",
    )
}


def classifier_config(**changes):
    valid = {field.name for field in dataclasses.fields(MemformerClassificationConfig)}
    fields = {name: value for name, value in tiny_config().to_dict().items() if name in valid}
    return MemformerClassificationConfig.from_dict({**fields, "num_labels": NUM_LABELS, **changes})


def tiny_classifier(seed=0, **changes):
    """Return a small float64 classifier, in evaluation mode unless it has dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MemformerForSequenceClassification(classifier_config(**changes)).double()
    return model.train(model.config.dropout > 0)


def documents_of(model, *, lengths=LENGTHS, seed=0):
    """Return documents of different lengths with their labels, as `make_rollout` takes them."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    labels = []
    for index, length in enumerate(lengths):
        per_segment = [(index + n) % NUM_LABELS for n in range(-(-length // model.segment_length))]
        labels.append(per_segment if model.config.label_unit == "segment" else per_segment[-1])
    return documents, labels
