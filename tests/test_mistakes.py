"""Error messages for invalid arguments without the run-time type checks that other tests enable."""

import pytest
import torch
from torch import nn

from memformer import InputError, InputTypeError, Session
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, tiny_model
from tests.models.baselines import tiny_baseline

B, S = 3, SEGMENT_LENGTH
TOKENS = torch.arange(B * S).view(B, S) % VOCAB_SIZE
MODELS = {
    "memformer": tiny_model,
    "its decoder reads more": lambda: tiny_model(decoder_starts_from_last_token=True),
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


@pytest.mark.parametrize("wrong", [5, None, iter([1]), {1: 2}, "text"])
def test_token_ids_that_are_no_list_are_refused(wrong):
    with pytest.raises(InputTypeError, match=f"token ids are a {type(wrong).__name__}; they must be a list"):
        Session(tiny_model()).feed(wrong)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), "runs/demo", None])
def test_what_is_no_model_is_refused_in_one_sentence(other):
    with pytest.raises(InputTypeError, match=f"model is a {type(other).__name__}; it must be a memformer model"):
        Session(other)
