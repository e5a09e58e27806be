"""The Recurrent Memory Transformer: its attention pattern, and gradients through its memory."""

import math

import pytest
import torch

from memformer import AttentionRecord, Rollout, backpropagate
from memformer.nn.attention import split_heads
from tests.helpers import SEGMENT_LENGTH, assert_close, random_rollout
from tests.models.baselines import tiny_baseline, tokens, used_memory


def rotated(vector, position):
    """Return the vector after rotary rotation, as a multiplication of complex numbers."""
    half = len(vector) // 2
    rotations = [complex(math.cos(a), math.sin(a)) for a in (position * 10_000.0 ** (-i / half) for i in range(half))]
    pairs = torch.complex(vector[:half], vector[half:]) * torch.tensor(rotations, dtype=torch.complex128)
    return torch.cat([pairs.real, pairs.imag])


def by_hand(model, segment, memory):
    """Return hidden states and next memory of one row, with the attention pattern of the class docstring."""
    num_memory, heads = len(memory), model.config.num_heads
    embedded = model.embedding(segment[None])[0] * 4.0  # sqrt(16)
    kinds = ["read"] * num_memory + ["token"] * len(segment) + ["write"] * num_memory
    states = [*memory, *embedded, *memory]
    for layer in model.layers:
        norm, attention = layer.self_attention_norm, layer.self_attention
        projected = [attention.query_key_value(norm(state)).view(3, heads, -1) for state in states]
        next_states = []
        for position, kind in enumerate(kinds):
            seen = [
                other
                for other in range(len(states))
                if kinds[other] == "read" or kind == "write" or (kind == "token" and other <= position)
            ]
            read = []
            for head in range(heads):
                query = rotated(projected[position][0, head], position)
                scores = torch.stack([query @ rotated(projected[other][1, head], other) for other in seen])
                weights = (scores / math.sqrt(len(query))).softmax(0)
                read.append(sum(w * projected[other][2, head] for w, other in zip(weights, seen, strict=True)))
            x = states[position] + attention.output(torch.cat(read))
            next_states.append(x + layer.feed_forward(layer.feed_forward_norm(x)[None, None])[0, 0])
        states = next_states
    states = model.norm(torch.stack(states))
    return states[num_memory:-num_memory], states[-num_memory:]


@pytest.mark.parametrize("length", [1, 4])
def test_every_token_attends_as_documented(length):
    model = tiny_baseline("recurrent memory")
    memory, segment = torch.randn(2, 3, 16).double(), tokens(2, length)
    hidden, next_memory = model.encode(segment, memory=memory)
    for row in range(2):
        expected, expected_memory = by_hand(model, segment[row], memory[row])
        assert_close(hidden[row], expected)
        assert_close(next_memory[row], expected_memory)


def test_a_document_starts_from_learned_memory_tokens():
    model = tiny_baseline("recurrent memory")
    assert torch.equal(model.initial_memory(2), model.memory_tokens.expand(2, 3, 16))
    backpropagate(model, random_rollout(2, 2))
    assert model.memory_tokens.grad.norm() > 0


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_gradient_flows_through_the_memory_from_the_last_timestep_to_the_first(method):
    model = tiny_baseline("recurrent memory")
    target_padding = torch.zeros(4, 2, SEGMENT_LENGTH, dtype=torch.bool)
    target_padding[:-1, :, 1:] = True  # one target per timestep: tokens that are not predicted are not read
    plain = random_rollout(4, 2)
    rollout = Rollout(inputs=plain.inputs, targets=plain.targets, target_padding=target_padding)
    with_last = backpropagate(model, rollout, memory=used_memory(model, 2), method=method)
    assert (with_last.memory_grad.flatten(1).norm(dim=1) > 0).all()
    model.zero_grad()
    without_last = backpropagate(model, rollout[:-1], memory=used_memory(model, 2), method=method)
    scale = with_last.num_tokens / without_last.num_tokens
    assert not torch.allclose(with_last.memory_grad * scale, without_last.memory_grad)


def test_the_attention_record_holds_what_a_single_token_and_a_single_slot_attend_to():
    """With one slot and one token, the token attends to the slot and itself; the written slot to these three."""
    model = tiny_baseline("recurrent memory, one token")
    record = AttentionRecord()
    hidden, memory = model.encode(tokens(2, 1), attention=record)
    expected_hidden, expected_memory = model.encode(tokens(2, 1))
    assert torch.equal(hidden, expected_hidden)
    assert torch.equal(memory, expected_memory)
    assert [tuple(weights.shape) for weights in record.reader] == [(2, 2, 1, 1)] * 2
    assert record.writer.shape == (2, 2, 1, 2)
    assert_close(record.writer.sum(dim=-1), torch.ones(2, 2, 1, dtype=torch.float64))
    layer = model.layers[0]
    x = torch.cat([model.initial_memory(2), model._embed(tokens(2, 1)), model.initial_memory(2)], dim=1)
    query, key, _ = layer.self_attention.query_key_value(layer.self_attention_norm(x)).chunk(3, dim=-1)
    positions = torch.arange(3)
    frame = model.positions(positions, key_positions=positions)
    query, key = frame.apply_to_queries(split_heads(query, 2)), frame.apply_to_keys(split_heads(key, 2))
    weights = (query[:, :, 1:2] @ key[:, :, :2].mT / math.sqrt(8)).softmax(dim=-1)
    assert_close(record.reader[0], weights[..., :1])
