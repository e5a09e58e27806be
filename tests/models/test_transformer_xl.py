"""Transformer-XL: its attention matches the paper's equations, and its memory replaces the earlier tokens."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import Rollout, backpropagate
from memformer.nn.distances import Distances, descending_sinusoids
from tests.helpers import assert_close, random_rollout
from tests.models.baselines import tiny_baseline, tokens, used_memory


def attention_by_hand(module, query, key, value, present):
    """Return attention by Dai et al.'s equation for A^rel and a softmax, pair by pair."""
    rows, heads, num_queries, head_width = query.shape
    num_keys, width = key.shape[2], heads * head_width
    read = torch.zeros_like(query)
    for b in range(rows):
        for h in range(heads):
            own = slice(h * head_width, (h + 1) * head_width)
            u, v = module.content_bias[h], module.distance_bias[h]
            for i in range(num_queries):
                position = num_keys - num_queries + i
                scores = {}
                for j in range(position + 1):
                    if not present[b][j]:
                        continue
                    distance = position - j
                    sines = torch.zeros(width).double()
                    for k in range(0, width, 2):
                        sines[k] = math.sin(distance / 10_000 ** (k / width))
                        sines[k + 1] = math.cos(distance / 10_000 ** (k / width))
                    vector = (module.projection.weight @ sines)[own]
                    content = query[b, h, i] @ key[b, h, j] + u @ key[b, h, j]
                    scores[j] = (content + query[b, h, i] @ vector + v @ vector) / math.sqrt(head_width)
                weights = torch.stack(list(scores.values())).softmax(0)
                read[b, h, i] = sum(weight * value[b, h, j] for weight, j in zip(weights, scores, strict=True))
    return read


@pytest.mark.parametrize("num_past", [0, 1, 4])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_attention_matches_the_papers_equation(num_past, num_queries):
    num_keys = num_past + num_queries
    module = Distances(8, num_heads=2).double()
    torch.nn.init.normal_(module.content_bias)
    torch.nn.init.normal_(module.distance_bias)
    query = torch.randn(2, 2, num_queries, 4).double()
    key, value = torch.randn(2, 2, 2, num_keys, 4).double()
    present = torch.ones(2, num_keys, dtype=torch.bool)
    present[1, : num_past // 2] = False
    frame = module(descending_sinusoids(num_keys, width=8, like=query))
    read = frame.attend(query, key, value, keep_mask=present[:, None, None, :])
    assert_close(read, attention_by_hand(module, query, key, value, present))
    assert_close(frame.attend(query[:1], key[:1], value[:1]), read[:1])


@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, 17)))
def test_a_memory_as_long_as_the_document_equals_full_attention(cuts):
    document = tokens(2, 18)
    whole = tiny_baseline("transformer decoder")
    expected, _ = whole.encode(document, memory=whole.initial_memory(2))
    model = tiny_baseline("transformer-xl", memory_length=18)
    model.load_state_dict(whole.state_dict())
    memory, hidden = model.initial_memory(2), []
    edges = [0, *sorted(cuts), 18]
    for start, end in pairwise(edges):
        states, memory = model.encode(document[:, start:end], memory=memory)
        hidden.append(states)
    assert_close(torch.cat(hidden, dim=1), expected)


@pytest.mark.parametrize("memory_length", [1, 4, 9])
def test_a_token_attends_to_memory_length_tokens_before_its_segment(memory_length):
    model = tiny_baseline("transformer-xl", num_layers=1, memory_length=memory_length)
    document = tokens(1, 15)

    def last_states(read):
        memory = model.initial_memory(1)
        for start in (0, 5, 10):
            states, memory = model.encode(read[:, start : start + 5], memory=memory)
        return states

    expected = last_states(document)
    for position in range(10):
        changed = document.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        is_seen = not torch.equal(last_states(changed), expected)
        assert is_seen == (position >= 10 - memory_length)


def test_the_memory_holds_the_inputs_of_each_layer_oldest_first():
    model = tiny_baseline("transformer-xl", memory_length=5)
    segment = tokens(1, 3)
    _, memory = model.encode(segment, memory=model.initial_memory(1))
    assert memory[0, :, -1].tolist() == [0, 0, 1, 1, 1]
    assert (memory[0, :2] == 0).all()
    embedded = model.embedding(segment)[0] * 4.0  # sqrt(16)
    assert_close(memory[0, 2:, :16], embedded)
    # The second layer's input, computed by a model with the first layer only.
    first_only = tiny_baseline("transformer-xl", memory_length=5, num_layers=1)
    weights = {name: model.state_dict()[name] for name in first_only.state_dict()}
    first_only.load_state_dict(weights)
    hidden, _ = first_only.encode(segment, memory=first_only.initial_memory(1))
    norm = model.norm
    assert_close(torch.nn.functional.layer_norm(memory[0, 2:, 16:32], (16,), norm.weight, norm.bias), hidden[0])


def test_no_gradient_flows_into_the_memory():
    model = tiny_baseline("transformer-xl")
    memory = used_memory(model, 2).requires_grad_()
    hidden, next_memory = model.encode(tokens(2, 6), memory=memory)
    assert not next_memory.requires_grad
    hidden.sum().backward()
    assert memory.grad is None
    model.zero_grad()
    rollout = random_rollout(3, 2)
    whole = backpropagate(model, rollout)
    assert whole.memory_grad.norm() == 0
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    # So the gradient of a rollout is the mean of the gradients of its separate timesteps.
    model.zero_grad()
    state = model.initial_memory(2)
    aligned = model.align_inputs(rollout)
    for t in range(3):
        one = Rollout(inputs=rollout.inputs[t : t + 1], targets=rollout.targets[t : t + 1])
        state = backpropagate(model, one, memory=state, gradient_scale=1 / 3).memory
        assert torch.equal(model.align_inputs(one).inputs[0], aligned.inputs[t])
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert_close(parameter.grad, grad)
