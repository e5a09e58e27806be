"""The decoder reads the last tokens of the previous segment again, as if they were its own first tokens."""

import pytest
import torch

from memformer import InputError
from tests.helpers import SEGMENT_LENGTH, assert_close, random_rollout, tiny_model


@pytest.mark.parametrize("num_slots", [0, 4])
def test_starting_from_the_last_token_equals_passing_it_as_decoder_start_ids(num_slots):
    plain = tiny_model(num_slots=num_slots, decoder_start_tokens=0)
    model = tiny_model(num_slots=num_slots, decoder_start_tokens=1)
    rollout = random_rollout(1, 3)
    segment, targets = rollout.inputs[0], rollout.targets[0]
    for padding in (None, torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [True] * 5 + [False]])):
        last = segment[:, -1] if padding is None else segment[torch.arange(3), torch.tensor([5, 3, 5])]
        read = {"memory": model.initial_memory(3), "padding_mask": padding}
        ours = model.token_nll(targets, hidden=model.encode(segment, **read)[0], hidden_padding_mask=padding)
        hidden, _ = plain.encode(segment, **read)
        theirs = plain.token_nll(targets, hidden=hidden, hidden_padding_mask=padding, decoder_start_ids=last)
        assert_close(ours, theirs)
        assert not torch.allclose(ours, plain.token_nll(targets, hidden=hidden, hidden_padding_mask=padding))


def test_hidden_states_without_start_tokens_are_refused():
    model, rollout = tiny_model(decoder_start_tokens=3), random_rollout(1, 3)
    hidden, _ = model.encode(rollout.inputs[0])
    with pytest.raises(InputError, match="hidden has 3 states per row; encode returns 3 .decoder_start_tokens. more"):
        model.decode(rollout.targets[0], hidden=hidden[:, :3])


@pytest.mark.parametrize("positions", ["rotary", "relative"])
@pytest.mark.parametrize("length", [1, 2, 3, SEGMENT_LENGTH])
def test_start_tokens_are_read_as_if_they_were_the_first_targets(positions, length):
    model = tiny_model(decoder_start_tokens=3, positions=positions)
    plain = tiny_model(decoder_start_tokens=0, positions=positions)
    rollout = random_rollout(1, 3)
    segment, targets = rollout.inputs[0, :, :length], rollout.targets[0]
    features = model.decode(targets, hidden=model.encode(segment)[0])
    # One pass of the decoder over the last tokens of the segment and the targets, at consecutive positions.
    past = plain.precompute_past(plain.encode(segment)[0])
    read_again = segment[:, -3:]
    places = torch.arange(1 - read_again.shape[1], targets.shape[1])
    x = plain._embed(torch.cat([read_again, targets[:, :-1]], dim=1))
    frame = plain.decoder.positions(places, key_positions=places)
    expected = plain.decoder._run_layers(x, past=past, frame=frame)[:, read_again.shape[1] - 1 :]
    assert_close(features, plain.embedding.logits(expected))
    for after in (True, False):  # padding stands after or before the tokens
        rest = torch.zeros_like(rollout.inputs[0, :, length:])
        padding = torch.cat(
            [torch.zeros_like(segment), 1 - rest] if after else [1 - rest, torch.zeros_like(segment)], 1
        )
        padded = torch.cat([segment, rest] if after else [rest, segment], dim=1)
        hidden, _ = model.encode(padded, padding_mask=padding.bool())
        assert_close(model.decode(targets, hidden=hidden, hidden_padding_mask=padding.bool()), features)
