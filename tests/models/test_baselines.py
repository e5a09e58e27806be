"""Properties of all baselines: rows and padding are independent, states are causal, folders are checked."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memformer
from memformer import (
    CheckpointError,
    InputError,
    InputTypeError,
    Memformer,
    backpropagate,
    build_model,
    evaluate,
    load_model,
)
from memformer.data import corpus_from_arrays
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, random_rollout, tiny_config
from tests.models.baselines import BASELINES, TYPES, tiny_baseline, tokens, used_memory

B, S = 3, SEGMENT_LENGTH

each_baseline = pytest.mark.parametrize("name", BASELINES)
each_type = pytest.mark.parametrize("name", TYPES)
few = settings(max_examples=15)


@st.composite
def token_ranges(draw):
    """Draw the range of a row's tokens: the first index, and the index after the last."""
    first = draw(st.integers(0, S))
    return first, draw(st.integers(first, S))


@each_baseline
@few
@given(rows=st.lists(token_ranges(), min_size=B, max_size=B))
def test_a_row_of_a_padded_batch_equals_its_tokens_without_padding(name, rows):
    model = tiny_baseline(name)
    memory, segment = used_memory(model, B), tokens(B, S)
    padding = torch.ones(B, S, dtype=torch.bool)
    for row, (first, end) in enumerate(rows):
        padding[row, first:end] = False
    hidden, next_memory = model.encode(segment, memory=memory, padding_mask=padding)
    assert hidden.isfinite().all()
    for row, (first, end) in enumerate(rows):
        one = slice(row, row + 1)
        if first == end:
            assert torch.equal(next_memory[one], memory[one])
            continue
        alone, alone_memory = model.encode(segment[one, first:end], memory=memory[one])
        assert_close(hidden[one, first:end], alone)
        assert_close(next_memory[one], alone_memory)


@each_baseline
def test_rows_of_a_batch_are_independent(name):
    model = tiny_baseline(name)
    memory, segment = used_memory(model, B), tokens(B, S)
    hidden, next_memory = model.encode(segment, memory=memory)
    for row in range(B):
        one = slice(row, row + 1)
        alone, alone_memory = model.encode(segment[one], memory=memory[one])
        assert_close(alone, hidden[one])
        assert_close(alone_memory, next_memory[one])


@each_baseline
def test_a_reset_row_equals_a_fresh_row(name):
    model = tiny_baseline(name)
    memory = model.reset_memory(used_memory(model, B), torch.tensor([True, False, True]))
    hidden, next_memory = model.encode(tokens(B, S), memory=memory)
    fresh, fresh_memory = model.encode(tokens(B, S), memory=model.initial_memory(B))
    assert torch.equal(hidden[[0, 2]], fresh[[0, 2]])
    assert torch.equal(next_memory[[0, 2]], fresh_memory[[0, 2]])
    assert model.memory_shape[0] == 0 or not torch.allclose(hidden[1], fresh[1])


@each_baseline
def test_a_state_depends_on_its_token_and_earlier_ones_and_predicts_the_next(name):
    model = tiny_baseline(name)
    memory, segment = used_memory(model, B), tokens(B, S)
    hidden, _ = model.encode(segment, memory=memory)
    for position in range(S):
        changed = segment.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB_SIZE
        difference = (model.encode(changed, memory=memory)[0] - hidden).abs().amax(dim=(0, 2))
        assert (difference[:position] == 0).all()
        assert (difference[position:] > 0).all()
    targets = tokens(B, 4, seed=3)
    logits = model.decode(targets, hidden=hidden)
    assert_close(logits, model.embedding.logits(hidden[:, :4]))
    padding = torch.zeros(B, 4, dtype=torch.bool)
    padding[0, 3:] = True
    nll = model.token_nll(targets, hidden=hidden, target_padding_mask=padding)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert_close(nll, expected.masked_fill(padding, 0.0))


@each_baseline
def test_evaluation_matches_the_nll_of_every_document_token_by_token(name):
    model = tiny_baseline(name)
    documents = [[int(token) for token in tokens(1, length, seed=length)[0]] for length in (1, 6, 13)]
    nll = 0.0
    for document in documents:
        memory = model.initial_memory(1)
        read = torch.tensor([[model.bos_token_id, *document[:-1]]])
        for start in range(0, len(document), S):
            hidden, memory = model.encode(read[:, start : start + S], memory=memory)
            log_probabilities = model.embedding.logits(hidden).log_softmax(-1)[0]
            for n, token in enumerate(document[start : start + S]):
                nll -= log_probabilities[n, token].item()
    corpus = corpus_from_arrays([np.array(document) for document in documents], VOCAB_SIZE)
    for num_lanes in (1, 2, 3):
        evaluation = evaluate(model, corpus, num_lanes=num_lanes, rollout_length=2)
        assert evaluation.with_memory.nll == pytest.approx(nll, rel=1e-10)


@each_type
def test_every_dropout_acts_in_training_only(name):
    for option in ("dropout", "attention_dropout"):
        if name == "lstm" and option == "attention_dropout":
            continue
        model = tiny_baseline(name, **{option: 0.5}).train()
        memory = model.initial_memory(B)
        first, second = (model.encode(tokens(B, S), memory=memory)[0] for _ in range(2))
        assert not torch.allclose(first, second)
        model.eval()
        first, second = (model.encode(tokens(B, S), memory=memory)[0] for _ in range(2))
        assert torch.equal(first, second)


@each_type
def test_the_memory_stays_in_float32_or_better(name):
    model = tiny_baseline(name)
    assert model.initial_memory(2).dtype == torch.float64
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, memory = model.encode(tokens(B, S), memory=model.initial_memory(B))
        assert model.decode(tokens(B, S), hidden=hidden).dtype == torch.bfloat16
    assert memory.dtype == torch.float32
    model.bfloat16()
    hidden, memory = model.encode(tokens(B, S), memory=model.initial_memory(B))
    assert (hidden.dtype, memory.dtype) == (torch.bfloat16, torch.float32)


@each_type
def test_errors_name_wrong_tokens_and_memories(name):
    model = tiny_baseline(name)
    memory = model.initial_memory(B)
    hidden, _ = model.encode(tokens(B, S), memory=memory)
    with pytest.raises(InputError, match="segment holds token id 12; valid ids are 0 to 11"):
        model.encode(torch.full((B, S), 12), memory=memory)
    with pytest.raises(InputError, match="targets holds token id 11; valid ids are 0 to 10"):
        model.decode(torch.full((B, S), 11), hidden=hidden)
    with pytest.raises(InputError, match="targets have 7 tokens per row, but hidden has 6 states per row"):
        model.decode(tokens(B, S + 1), hidden=hidden)
    with pytest.raises(InputError, match="it may be the memory of another model"):
        model.encode(tokens(B, S), memory=memory[:, :-1])
    with pytest.raises(InputTypeError, match="memory has dtype torch.float32"):
        model.encode(tokens(B, S), memory=memory.float())


@each_baseline
def test_a_saved_and_loaded_model_is_the_same(name, tmp_path):
    model = tiny_baseline(name).float()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    for loaded in (type(model).from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(loaded) is type(model)
        assert loaded.config == model.config
        assert not loaded.training
        memory, segment = loaded.initial_memory(B), tokens(B, S)
        assert torch.equal(loaded.encode(segment, memory=memory)[0], model.encode(segment, memory=memory)[0])
        hidden, _ = loaded.train().encode(segment, memory=memory)
        hidden.sum().backward()
        assert all(not parameter.is_meta for parameter in loaded.parameters())
        assert next(loaded.layers.parameters()).grad is not None


def test_a_folder_of_another_type_is_refused(tmp_path):
    classes = [Memformer, *(type(tiny_baseline(name)) for name in TYPES)]
    for name in TYPES:
        folder = tmp_path / name
        model = tiny_baseline(name)
        model.save_pretrained(folder)
        for other in classes:
            if other is not type(model):
                found, expected = model.config.model_type, other.config_class.model_type
                with pytest.raises(CheckpointError, match=f"not describe an? {expected}: model_type is '{found}'"):
                    other.from_pretrained(folder)
    with pytest.raises(InputError, match=r"num_slots \(4\) is for a memformer; .*lstm holds an lstm"):
        load_model(tmp_path / "lstm", num_slots=4)


def test_load_model_loads_a_folder_by_its_model_type(tmp_path):
    model = build_model(tiny_config())
    assert type(model) is Memformer
    model.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), Memformer)
    assert load_model(tmp_path, num_slots=5).config.num_slots == 5
    config = tmp_path / "config.json"
    for wrong in ("bert", None, [1]):
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": wrong}))
        with pytest.raises(CheckpointError, match=r"model_type \(.*\) must be one of memformer, lstm, transformer_xl"):
            load_model(tmp_path)


@each_type
def test_a_config_that_does_not_fit_the_weights_is_refused(name, tmp_path):
    tiny_baseline(name).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    for changes, message in (
        ({"num_layers": 10_000_000}, "has 2 layers; its config says 10000000"),
        ({"d_model": 8_000_000}, "has shape .*; this model's is .*[48]000000"),
        ({"num_layer": 2}, "unknown key 'num_layer' in model config; did you mean 'num_layers'"),
    ):
        config.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lstm", {"num_layers": 0}, r"num_layers \(0\) must be at least 1"),
        ("lstm", {"adaptive_cutoffs": (8, 4)}, r"adaptive_cutoffs \(\[8, 4\]\) must be strictly ascending"),
        ("lstm", {"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ("transformer-xl", {"num_heads": 3}, r"d_model \(16\) must be a multiple of num_heads \(3\)"),
        ("transformer-xl", {"memory_length": -1}, r"memory_length \(-1\) must be at least 0"),
        ("transformer-xl", {"attention_dropout": -0.5}, r"attention_dropout \(-0.5\) must be at least 0"),
        ("compressive", {"compressed_length": 0}, r"compressed_length \(0\) must be at least 1"),
        ("compressive", {"memory_length": 1}, r"memory_length \(1\) must be at least compression_rate \(2\)"),
        ("compressive", {"compression_rate": 0}, r"compression_rate \(0\) must be at least 1"),
        ("compressive", {"memory_length": 2**22, "compression_rate": 2**22}, r"times d_model \(16\) must be at most"),
        ("compressive", {"reconstruction_weight": -1.0}, r"reconstruction_weight \(-1.0\) must be at least 0"),
        ("recurrent memory", {"num_memory_tokens": 0}, r"num_memory_tokens \(0\) must be at least 1"),
        ("recurrent memory", {"d_model": 6}, "rotary positions need an even head width"),
    ],
)
def test_wrong_configs_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_baseline(name, **changes)


@each_baseline
def test_configs_survive_a_round_trip_through_a_dictionary(name):
    config = tiny_baseline(name, dropout=0.1).config
    assert type(config).from_dict(config.to_dict()) == config
    assert type(config).__name__ in memformer.__all__


def test_a_baseline_is_not_compiled_as_a_whole_which_would_have_no_effect():
    with pytest.raises(
        InputError, match=r"a TransformerXL cannot be compiled in one call.* compile its layers instead"
    ):
        tiny_baseline("transformer-xl").compile()


def test_the_model_inside_another_wrapper_is_asked_for():
    averaged = torch.optim.swa_utils.AveragedModel(tiny_baseline("lstm"))
    with pytest.raises(InputTypeError, match=r"model is an AveragedModel; .*; give its \.module"):
        backpropagate(averaged, random_rollout(2, 2))
    backpropagate(averaged.module, random_rollout(2, 2))
