"""The LSTM: its memory is its whole state, and its cell matches the equations."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import backpropagate
from tests.helpers import assert_close, random_rollout
from tests.models.baselines import tiny_baseline, tokens, used_memory


def by_hand(model, segment):
    """Return the hidden states of all tokens, and h and c of each layer, from explicit gates."""
    width = model.config.d_model
    states = [
        (torch.zeros(len(segment), width).double(), torch.zeros(len(segment), width).double()) for _ in model.layers
    ]
    hidden = []
    for n in range(segment.shape[1]):
        x = model.embedding(segment[:, n : n + 1])[:, 0] * width**0.5
        for index, layer in enumerate(model.layers):
            h, c = states[index]
            gates = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
            input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=-1)
            c = forget_gate.sigmoid() * c + input_gate.sigmoid() * new.tanh()
            x = output_gate.sigmoid() * c.tanh()
            states[index] = x, c
        hidden.append(x)
    return torch.stack(hidden, dim=1), torch.stack([h for h, _ in states] + [c for _, c in states], dim=1)


def test_states_match_the_equations():
    model, segment = tiny_baseline("lstm"), tokens(2, 9)
    hidden, memory = model.encode(segment, memory=model.initial_memory(2))
    expected, expected_memory = by_hand(model, segment)
    assert_close(hidden, expected)
    assert_close(memory, expected_memory)


@settings(max_examples=20)
@given(cuts=st.sets(st.integers(1, 19)), padded=st.booleans())
def test_any_segmentation_gives_the_same_states(cuts, padded):
    model, document = tiny_baseline("lstm"), tokens(2, 20)
    expected, expected_memory = model.encode(document, memory=model.initial_memory(2))
    memory, hidden = model.initial_memory(2), []
    edges = [0, *sorted(cuts), 20]
    for start, end in pairwise(edges):
        segment, padding = document[:, start:end], None
        if padded:
            segment = torch.cat([tokens(2, 2, seed=8), segment, tokens(2, 1, seed=9)], dim=1)
            padding = torch.ones(segment.shape, dtype=torch.bool)
            padding[:, 2:-1] = False
        states, memory = model.encode(segment, memory=memory, padding_mask=padding)
        hidden.append(states[:, 2:-1] if padded else states)
    assert_close(torch.cat(hidden, dim=1), expected)
    assert_close(memory, expected_memory)


def test_forget_gates_start_open_and_other_biases_at_zero():
    model = tiny_baseline("lstm", num_layers=3)
    model._initialise()
    for layer in model.layers:
        gates = (layer.bias_ih_l0 + layer.bias_hh_l0).unflatten(0, (4, -1))
        assert torch.equal(gates, torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand_as(gates).double())


def test_dropout_acts_only_between_layers():
    memory, segment = tiny_baseline("lstm", num_layers=1).initial_memory(2), tokens(2, 6)
    model = tiny_baseline("lstm", num_layers=1, dropout=0.5)
    model.embedding_dropout.p = 0.0  # the embedded tokens have dropout too
    dropped, _ = model.encode(segment, memory=memory)
    assert torch.equal(dropped, model.eval().encode(segment, memory=memory)[0])


def test_gradients_reach_the_initial_memory():
    model = tiny_baseline("lstm")
    result = backpropagate(model, random_rollout(3, 2), memory=used_memory(model, 2))
    assert (result.memory_grad.flatten(1).norm(dim=1) > 0).all()


def test_autocast_does_not_change_the_states():
    model = tiny_baseline("lstm").float()
    memory, segment = model.initial_memory(2), tokens(2, 6)
    expected, expected_memory = model.encode(segment, memory=memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, next_memory = model.encode(segment, memory=memory)
    assert torch.equal(hidden, expected)
    assert torch.equal(next_memory, expected_memory)
