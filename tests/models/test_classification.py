"""The classifier: padding, streams, saving, and refusals of input that does not fit."""

import json
from collections.abc import Sequence

import pytest
import torch

from memformer import (
    CheckpointError,
    ClassificationStream,
    InputError,
    InputTypeError,
    MemformerClassificationConfig,
    MemformerForSequenceClassification,
    Session,
    load_model,
)
from tests.helpers import SEGMENT_LENGTH, VARIANTS, VOCAB_SIZE, assert_close, tiny_model
from tests.models.classifiers import (
    CLASSIFIERS,
    LENGTHS,
    NUM_LABELS,
    SOME,
    classifier_config,
    documents_of,
    tiny_classifier,
)


def fed_in_pieces(model, document, sizes):
    stream, found, start = model.stream(), [], 0
    while start < len(document):
        size = sizes[len(found) % len(sizes)]
        found.append(stream.feed(document[start : start + size]))
        start += size
    assert stream.num_tokens == len(document)
    return torch.cat(found), stream.log_probabilities()


@pytest.mark.parametrize("name", SOME)
def test_a_stream_in_any_split_equals_the_whole_computation(name):
    model = tiny_classifier(**SOME[name])
    documents, labels = documents_of(model)
    whole, memory = model.rollout_log_probabilities(model.make_rollout(documents, labels))
    assert memory.shape == (len(documents), *model.memory_shape)
    for row, document in enumerate(documents):
        num_segments = -(-len(document) // SEGMENT_LENGTH)
        num_full = len(document) // SEGMENT_LENGTH
        for sizes in ([0, 1, 4, 7], [1000]):
            segments, last = fed_in_pieces(model, document, sizes)
            assert_close(segments, whole[:num_full, row])
            assert_close(last, whole[num_segments - 1, row])
        expected = whole[:num_segments, row]
        if model.config.label_unit == "document":
            expected = expected[-1]
        assert_close(model.log_probabilities(document), expected)
        assert model.classify(torch.tensor(document)) == expected.argmax(dim=-1).tolist()


def test_an_interrupted_stream_goes_on_from_the_tokens_that_it_has_read(monkeypatch):
    model = tiny_classifier()
    document = documents_of(model)[0][-1]
    document = [*document, *document, *document][: 3 * SEGMENT_LENGTH + 2]
    stream, calls, encode = model.stream(), [], model.encode
    stream.feed(document[:2])

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(model, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.feed(document[2:])
    assert stream.num_tokens == SEGMENT_LENGTH
    stream.feed(document[stream.num_tokens :])
    assert_close(stream.log_probabilities(), model.log_probabilities(document))


def test_a_changed_result_does_not_change_the_stream():
    model = tiny_classifier()
    stream = model.stream()
    stream.feed([1] * SEGMENT_LENGTH)
    expected = stream.log_probabilities().clone()
    stream.log_probabilities().exp_()
    assert torch.equal(stream.log_probabilities(), expected)


def test_long_documents_are_read_in_parts(monkeypatch):
    model = tiny_classifier(label_unit="segment")
    document = documents_of(model)[0][-1]
    expected = model.log_probabilities(document)
    monkeypatch.setattr("memformer.models.classification._CHUNK_SEGMENTS", 1)
    assert expected.shape == (4, NUM_LABELS)
    assert_close(model.log_probabilities(document), expected)


def test_the_default_device_of_new_tensors_does_not_matter():
    model = tiny_classifier()
    expected = model.log_probabilities([1, 2, 3])
    with torch.device("meta"):  # where no value can be read
        stream = model.stream()
        stream.feed([1, 2, 3])
    assert stream.log_probabilities().equal(expected)


def test_looking_at_a_stream_does_not_change_it():
    model = tiny_classifier()
    document = documents_of(model)[0][-1]
    stream = model.stream()
    for token in document:
        stream.feed([token])
        stream.log_probabilities()
    assert_close(stream.log_probabilities(), model.log_probabilities(document))


def test_the_state_of_a_stream_does_not_grow():
    model = tiny_classifier()
    stream = ClassificationStream(model)
    size = stream.state_bytes
    held = []
    for _ in range(3):
        stream.feed([1] * (9 * SEGMENT_LENGTH + 1))
        tensors = [each for each in stream._state if isinstance(each, torch.Tensor)]
        held.append(sum(each.untyped_storage().nbytes() for each in tensors))
        assert held[-1] <= stream.state_bytes == size
    assert len(tensors) == 3
    assert all(not each.requires_grad for each in tensors)


def test_reading_leaves_the_modes_of_a_model_in_training():
    model = tiny_classifier(dropout=0.5)
    document = documents_of(model)[0][-1]
    assert torch.equal(model.log_probabilities(document), model.log_probabilities(document))
    assert model.training
    assert model.head_dropout.training


@pytest.mark.parametrize("pooling", ["mean", "last", "memory"])
@pytest.mark.parametrize("front", [0, 2])
def test_a_padded_row_equals_the_row_without_padding(pooling, front):
    model = tiny_classifier(pooling=pooling, convolution_kernel=3)
    tokens = torch.randint(0, VOCAB_SIZE, (1, 3))
    padded = torch.full((2, 6), 7)
    padded[0, front : front + 3] = tokens
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[0, front : front + 3] = False
    memory = model.initial_memory(2)
    hidden, next_memory = model.encode(padded, memory=memory, padding_mask=mask)
    expected, expected_memory = model.encode(tokens)
    assert_close(hidden[:1], expected)
    assert_close(next_memory[:1], expected_memory)
    assert torch.equal(next_memory[1], memory[1])
    assert hidden.isfinite().all()


@pytest.mark.parametrize("name", ["segments, memory", "without memory", "adaptive softmax"])
def test_saved_and_loaded_model_is_the_same(tmp_path, name):
    model = tiny_classifier(**CLASSIFIERS[name]).float()
    model.save_pretrained(tmp_path)
    loaded = MemformerForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "memformer_classification"
    document = documents_of(model)[0][-1]
    assert torch.equal(loaded.log_probabilities(document), model.log_probabilities(document))


def test_a_classifier_is_not_taken_for_a_language_model(tmp_path):
    model = tiny_classifier()
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="holds a classifier.*MemformerForSequenceClassification.from_pretrained"):
        load_model(tmp_path / "classifier")
    with pytest.raises(InputTypeError, match="a session needs a LanguageModel"):
        Session(model)
    tiny_model().save_pretrained(tmp_path / "memformer")
    with pytest.raises(CheckpointError, match="does not describe a memformer_classification"):
        MemformerForSequenceClassification.from_pretrained(tmp_path / "memformer")


def test_a_classifier_can_run_with_more_slots(tmp_path):
    model = tiny_classifier(**CLASSIFIERS["exchangeable slots"])
    model.save_pretrained(tmp_path)
    loaded = MemformerForSequenceClassification.from_pretrained(tmp_path, num_slots=9)
    assert loaded.stream().feed([1] * 20).shape == (3, NUM_LABELS)
    assert loaded.initial_memory(1).shape[1] == 9


@pytest.mark.parametrize("name", ["default", "without memory", "adaptive softmax", "separate attention"])
def test_a_classifier_starts_from_the_encoder_of_a_memformer(name):
    memformer = tiny_model(**VARIANTS[name])
    model = MemformerForSequenceClassification.from_memformer(memformer, num_labels=4, pooling="last")
    segment = torch.randint(0, VOCAB_SIZE, (2, 5))
    hidden, memory = memformer.encode(segment)
    pooled, own_memory = model.eval().encode(segment)
    assert torch.equal(pooled[:, 0], hidden[:, 4])
    assert torch.equal(own_memory, memory)
    assert model.num_labels == 4
    weights = memformer.encoder.norm.weight
    weights.data.zero_()
    assert model.encoder.norm.weight.norm() > 0


def test_another_encoder_than_the_memformers_is_refused():
    with pytest.raises(InputError, match=r"another encoder .*: .* has shape \(9, 16\), not \(5, 16\)"):
        MemformerForSequenceClassification.from_memformer(tiny_model(), num_slots=9)
    with pytest.raises(InputError, match="another encoder than the Memformer's"):
        MemformerForSequenceClassification.from_memformer(tiny_model(), num_encoder_layers=1)


def test_a_rollout_of_documents_has_labels_where_documents_end():
    model = tiny_classifier()
    documents, labels = documents_of(model)
    rollout = model.make_rollout(documents, labels)
    assert rollout.inputs.shape == (4, 3, SEGMENT_LENGTH)
    assert rollout.count_input_tokens() == sum(LENGTHS)
    ends = [(timestep, row) for timestep, row, _ in (~rollout.target_padding).nonzero().tolist()]
    assert sorted(ends, key=lambda end: end[1]) == [(0, 0), (1, 1), (3, 2)]
    assert [int(rollout.targets[end]) for end in sorted(ends, key=lambda end: end[1])] == labels
    segments = tiny_classifier(label_unit="segment")
    assert segments.make_rollout(*documents_of(segments)).count_target_tokens() == 1 + 2 + 4


class Column(Sequence):
    """Looks items up by name, and iterates in another order, as a column of a sorted pandas table."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, name):
        return sorted(self.items)[name]

    def __iter__(self):
        return iter(self.items)


def test_documents_and_labels_belong_together_by_position():
    model = tiny_classifier()
    rollout = model.make_rollout(Column([[2], [0], [1]]), Column([2, 0, 1]))
    assert torch.equal(rollout.inputs[0, :, 0], rollout.targets[0, :, 0])
    assert rollout.targets[0, :, 0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("labels", [{0: 1, 1: 0}, {0, 1}, "01"])
def test_labels_of_segments_without_an_order_are_refused(labels):
    with pytest.raises(InputTypeError, match="labels of document 0 .* must be a list with one for each segment"):
        tiny_classifier(label_unit="segment").make_rollout([[1] * 7], [labels])


@pytest.mark.parametrize(
    ("unit", "documents", "labels", "message"),
    [
        ("document", [[1]], [3], r"label of document 0 \(3\) must be .*2"),
        ("document", [[1]], [0, 1], "there are 1 documents and 2 items of labels"),
        ("document", [], [], "there are 0 documents"),
        ("document", [[1], []], [0, 1], "document 1 has no token"),
        ("document", [[VOCAB_SIZE]], [0], f"token id {VOCAB_SIZE} is outside the vocabulary"),
        ("segment", [[1] * 7], [[0]], "document 0 has 2 segments and 1 labels"),
        ("segment", [[1] * 7], [0], "document 0 has 2 segments and one label"),
        ("segment", [[1]], [torch.tensor(0)], "document 0 has 1 segments and one label"),
    ],
)
def test_documents_and_labels_that_do_not_fit_are_refused(unit, documents, labels, message):
    with pytest.raises(InputError, match=message):
        tiny_classifier(label_unit=unit).make_rollout(documents, labels)


def test_a_call_names_the_methods_that_a_classifier_has():
    """PyTorch raises NotImplementedError for a module without `forward`; the message must fit this model."""
    with pytest.raises(NotImplementedError, match=r"use encode.*, classify\(token_ids\) or log_probabilities"):
        tiny_classifier()([1])


def test_tokens_that_do_not_fit_are_refused_before_anything_is_read():
    model = tiny_classifier()
    stream = model.stream()
    with pytest.raises(InputError, match="no token has been read"):
        stream.log_probabilities()
    with pytest.raises(InputError, match="no token has been read"):
        model.classify([])
    with pytest.raises(InputError, match="token id 11 is outside the vocabulary"):
        stream.feed([1] * 20 + [VOCAB_SIZE])
    with pytest.raises(InputTypeError, match="token ids have dtype float"):
        stream.feed(torch.ones(3))
    assert stream.num_tokens == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 1}, "num_labels"),
        ({"label_unit": "token"}, "label_unit .*document, segment"),
        ({"pooling": "max"}, "pooling .*mean, last, memory"),
        ({"pooling": "memory", "num_slots": 0}, "pooling is memory, but num_slots is 0"),
        ({"num_decoder_layers": 2}, "unknown key 'num_decoder_layers'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        classifier_config(**fields)


def test_presets_are_those_of_a_memformer():
    config = MemformerClassificationConfig.from_preset("recall", num_labels=5)
    assert (config.write_competition, config.num_labels) == (True, 5)
