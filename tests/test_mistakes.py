"""Error messages for invalid arguments without the run-time type checks that other tests enable."""

import dataclasses

import pytest
import torch
from torch import nn

from memformer import InputError, InputTypeError, Memformer, Session
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline
from tests.models.classifiers import tiny_classifier

B, S = 3, SEGMENT_LENGTH
TOKENS = torch.arange(B * S).view(B, S) % VOCAB_SIZE
MODELS = {
    "memformer": tiny_model,
    "its decoder reads less": lambda: tiny_model(decoder_start_tokens=0),
    "without memory": lambda: tiny_model(num_slots=0),
    "lstm": lambda: tiny_baseline("lstm"),
    "transformer-xl": lambda: tiny_baseline("transformer-xl"),
    "recurrent memory": lambda: tiny_baseline("recurrent memory"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_error_names_an_invalid_mask_or_hidden_state(make):
    model = make()
    hidden, _ = model.encode(TOKENS)
    none = torch.zeros(B, S, dtype=torch.bool)
    for wrong in (none[:1], none[:, :-1], none[0]):
        with pytest.raises(InputError, match="padding_mask has shape"):
            model.encode(TOKENS, padding_mask=wrong)
        with pytest.raises(InputError, match="hidden_padding_mask has shape"):
            model.decode(TOKENS, hidden=hidden, hidden_padding_mask=wrong)
        with pytest.raises(InputError, match="target_padding_mask has shape"):
            model.token_nll(TOKENS, hidden=hidden, target_padding_mask=wrong)
    with pytest.raises(InputTypeError, match="padding_mask has dtype torch.int64; it must be torch.bool"):
        model.encode(TOKENS, padding_mask=none.long())
    for wrong in (hidden[:1], hidden[..., :-1], hidden[0]):
        with pytest.raises(InputError, match="hidden has shape"):
            model.decode(TOKENS, hidden=wrong)
    model.decode(TOKENS, hidden=hidden, hidden_padding_mask=none)


@pytest.mark.parametrize("wrong", [5, None, iter([1]), {1: 2}, {1, 2}, "text"])
def test_token_ids_that_are_no_list_are_refused(wrong):
    with pytest.raises(InputTypeError, match=f"token ids are an? {type(wrong).__name__}; they must be a list"):
        Session(tiny_model()).feed(wrong)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), "runs/demo", None])
def test_what_is_no_model_is_refused_in_one_sentence(other):
    with pytest.raises(InputTypeError, match=f"model is an? {type(other).__name__}; it must be a memformer model"):
        Session(other)


@pytest.mark.parametrize(
    ("wrong", "as_two_rows", "error", "message"),
    [
        ([1, [2, 3]], [[1], [1, [2, 3]]], InputError, r"token ids \(\[1, \[2, 3\]\]\) must be one-dimensional"),
        (
            torch.ones(2, dtype=torch.bfloat16),
            [[1], torch.ones(2, dtype=torch.bfloat16)],
            InputTypeError,
            "token ids have dtype bfloat16; they must be integers",
        ),
        (torch.tensor(3), torch.tensor(3), InputTypeError, "token ids are a Tensor; they must be a list"),
    ],
)
def test_token_ids_of_a_wrong_kind_are_refused(wrong, as_two_rows, error, message):
    for num_rows, given in ((1, wrong), (2, as_two_rows)):
        session = Session(tiny_model(), batch_size=num_rows)
        with pytest.raises(error, match=message):
            session.feed(given)
        assert session.num_tokens == [0] * num_rows


def test_a_row_of_single_tokens_is_not_taken_for_rows():
    session = Session(tiny_model())
    session.feed(list(torch.tensor([1, 2, 3])))
    assert session.num_tokens == [3]


def test_start_ids_and_labels_of_a_wrong_kind_are_refused():
    model, rollout = tiny_model(), random_rollout(1, B)
    hidden, _ = model.encode(TOKENS)
    for wrong, error, message in (
        ([1, 2, 3], InputTypeError, "decoder_start_ids is of class list; it must be a Tensor"),
        (torch.zeros(B + 1, dtype=torch.int64), InputError, r"decoder_start_ids have shape \(4,\); it must be \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            model.token_nll(TOKENS, hidden=hidden, decoder_start_ids=wrong)
    with pytest.raises(InputTypeError, match="rollout decoder_start_ids is of class list"):
        dataclasses.replace(rollout, decoder_start_ids=[[1] * B])
    classifier = tiny_classifier()
    state, _ = classifier.encode(TOKENS)
    with pytest.raises(InputTypeError, match=r"labels \(targets\) is of class list"):
        classifier.decode([[1]], hidden=state)
    with pytest.raises(InputTypeError, match="hidden is of class list"):
        classifier.decode(torch.zeros(B, 1, dtype=torch.int64), hidden=[1])
    for documents, labels in (([[1]], 1), (5, [1]), ("text", [1])):
        with pytest.raises(InputTypeError, match="must be a list with one item for each document"):
            classifier.make_rollout(documents, labels)


def test_numbers_beyond_the_range_of_floats_are_refused():
    with pytest.raises(InputError, match=r"write_temperature \(inf\) must be .* finite"):
        tiny_model(write_temperature=10**400)
    with pytest.raises(InputError, match="d_model .* must be at most"):
        tiny_model(d_model=10**400)


@pytest.mark.parametrize("path", [b"state", 3, None])
def test_a_path_is_a_string_or_a_path(path):
    for call in (Session(tiny_model()).save, Memformer.from_pretrained, tiny_model().save_pretrained):
        with pytest.raises(InputTypeError, match=r"a path \(.*\) is .*; it must be a string or a Path"):
            call(path)


def test_allowed_token_ids_are_a_function():
    with pytest.raises(InputTypeError, match="allowed_token_ids must be a function"):
        Session(tiny_model()).stream(3, allowed_token_ids=[1, 2])


def test_a_classifier_with_broken_weights_has_no_label():
    model = tiny_classifier()
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match="the labels' probabilities are not finite"):
        model.classify([1, 2, 3])


def test_flags_and_parts_of_a_rollout_have_their_type():
    rollout = random_rollout(2, 2)
    with pytest.raises(InputTypeError, match=r"is_shifted \('no'\) must be"):
        dataclasses.replace(rollout, is_shifted="no")
    with pytest.raises(InputTypeError, match=r"targets_are_answers \(2\) must be"):
        dataclasses.replace(rollout, targets_are_answers=2)
    with pytest.raises(InputTypeError, match=r"timesteps is of class int; it must be a slice, as in rollout\[2:5\]"):
        rollout[0]


def test_metadata_of_a_session_are_valid_strings(tmp_path):
    session = Session(tiny_model())
    with pytest.raises(InputTypeError, match=r"metadata\['a'\] is of class int; it must be a str"):
        session.save(tmp_path / "new", metadata={"a": 1})
    with pytest.raises(InputError, match=r"metadata\['a'\] holds a lone surrogate at character 1"):
        session.save(tmp_path / "new", metadata={"a": "b\ud800"})
    assert not (tmp_path / "new").exists()
