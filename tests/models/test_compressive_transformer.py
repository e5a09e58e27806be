"""The Compressive Transformer: layout and timing of its memory, attention to it, and the reconstruction loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer import Rollout, backpropagate
from memformer.nn import AuxiliaryLoss
from tests.helpers import SEGMENT_LENGTH, assert_close, random_rollout
from tests.models.baselines import tiny_baseline, tokens, used_memory

B = 3
COMPRESSIVE = ["compressive", "compressive, uneven", "compressive, mean"]
# Numbers of tokens in each row of each timestep.
lengths = st.lists(st.lists(st.integers(0, 7), min_size=B, max_size=B), min_size=1, max_size=6)
few = settings(max_examples=15)


def read(model, lengths):
    """Yield for each timestep the segment, its padding, the hidden states of its tokens and the next memory."""
    memory = model.initial_memory(B)
    for timestep, counts in enumerate(lengths):
        segment = tokens(B, 7, seed=timestep)
        padding = torch.arange(7) >= torch.tensor(counts)[:, None]
        hidden, memory = model.encode(segment, memory=memory, padding_mask=padding)
        yield segment, padding, hidden, memory


@few
@given(lengths=lengths, memory_length=st.integers(1, 5), compressed_length=st.integers(1, 5))
def test_compression_with_rate_one_equals_a_longer_memory(lengths, memory_length, compressed_length):
    model = tiny_baseline(
        "compressive, mean", memory_length=memory_length, compressed_length=compressed_length, compression_rate=1
    )
    longer = tiny_baseline("transformer-xl", memory_length=memory_length + compressed_length)
    longer.load_state_dict(model.state_dict())
    for ours, theirs in zip(read(model, lengths), read(longer, lengths), strict=True):
        padding = ours[1]
        assert_close(ours[2][~padding], theirs[2][~padding])
        assert_close(ours[3], theirs[3])


@pytest.mark.parametrize("name", COMPRESSIVE)
@few
@given(lengths=lengths)
def test_the_memory_is_a_list_of_tokens_whose_oldest_are_compressed_in_whole_blocks(name, lengths):
    model = tiny_baseline(name)
    config = model.config
    recent, compressed = [[] for _ in range(B)], [[] for _ in range(B)]
    for segment, padding, _, memory in read(model, lengths):
        for row in range(B):
            embedded = model.embedding(segment[row : row + 1])[0] * 4.0  # sqrt(16): the input of the first layer
            recent[row] += [state for state, is_padding in zip(embedded, padding[row], strict=True) if not is_padding]
            while len(recent[row]) > config.memory_length:
                block = torch.stack([recent[row].pop(0) for _ in range(config.compression_rate)])
                if config.compression == "mean":
                    compressed[row].append(block.sum(dim=0) / len(block))
                    continue
                kernel = model.compressions[0].projection.weight.unflatten(1, (len(block), -1))
                parts = [kernel[:, position] @ state for position, state in enumerate(block)]
                compressed[row].append(sum(parts) + model.compressions[0].projection.bias)
            compressed[row] = compressed[row][-config.compressed_length :]
            for part, expected in zip(
                memory[row].split([config.compressed_length, config.memory_length]),
                (compressed[row], recent[row]),
                strict=True,
            ):
                num_missing = len(part) - len(expected)
                assert part[:, -1].tolist() == [0.0] * num_missing + [1.0] * len(expected)
                assert (part[:num_missing] == 0).all()
                if expected:
                    assert_close(part[num_missing:, :16], torch.stack(expected))


def test_empty_slots_behind_compressed_memories_add_nothing_to_distances():
    """A memory of 6 tokens that holds 5 or 6 of them: a token sees them, and the compressed ones, without a gap."""
    model = tiny_baseline("compressive", num_layers=2)
    config, memory, num_gaps = model.config, model.initial_memory(1), 0
    for timestep in range(6):
        segment = tokens(1, 5, seed=timestep)
        is_present = memory[0, :, -1] > 0
        num_gaps += bool(is_present[0 : config.compressed_length].any() and not is_present[config.compressed_length])
        packed = torch.cat([memory[:, ~is_present], memory[:, is_present]], dim=1)
        hidden, following = model.encode(segment, memory=memory)
        assert_close(hidden, model._run_layers(model._embed(segment), packed)[0])
        memory = following
    assert num_gaps


def test_a_state_depends_on_the_memory_and_the_compressed_memory_only():
    model = tiny_baseline("compressive", num_layers=1)  # a memory of 6 tokens, and 4 compressed memories of 2 tokens
    document = tokens(1, 30)

    def last_state(document):
        memory = model.initial_memory(1)
        for start in range(0, 30, 6):
            hidden, memory = model.encode(document[:, start : start + 6], memory=memory)
        return hidden[:, 0]

    expected = last_state(document)
    for position in range(24):
        changed = document.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        assert (not torch.equal(last_state(changed), expected)) == (position >= 24 - 6 - 8)


def test_the_likelihood_gives_no_gradient_to_memory_or_compression():
    model = tiny_baseline("compressive")
    memory = used_memory(model, 2).requires_grad_()
    total = 0.0
    for seed in range(4):
        hidden, memory_after = model.encode(tokens(2, 6, seed=seed), memory=memory)
        assert not memory_after.requires_grad
        total, memory = total + hidden.sum(), memory_after.requires_grad_()
        total.backward(retain_graph=True)
        assert memory.grad is None
    assert all(parameter.grad is None for parameter in model.compressions.parameters())


def reconstruction_by_hand(model, segment, padding, memory):
    """Return the loss, computed by token and head; only the compressed blocks have gradient."""
    config, total = model.config, torch.zeros(()).double()
    heads, rate = config.num_heads, config.compression_rate
    _, next_memory = model.encode(segment, memory=memory, padding_mask=padding)
    for row in range(len(segment)):
        # The inputs of each layer are read from the next memory, which holds the whole segment.
        present = memory[row, config.compressed_length :]
        recent = [slot for slot in present if slot[-1] > 0]
        num_tokens = int((~padding[row]).sum())
        arrived = list(next_memory[row, len(next_memory[row]) - num_tokens :]) if num_tokens else []
        num_blocks = -(-max(len(recent) + num_tokens - config.memory_length, 0) // rate)
        if not num_blocks:
            continue
        leaving = torch.stack(recent[: num_blocks * rate]).detach()
        for index, layer in enumerate(model.layers):
            own = slice(index * 16, (index + 1) * 16)
            norm = layer.self_attention_norm
            weights = [part.detach() for part in layer.self_attention.query_key_value.weight.chunk(3)]
            scale, shift = norm.weight.detach(), norm.bias.detach()

            def normalize(x, scale=scale, shift=shift):
                centred = x - x.mean()
                return centred / (centred.square().mean() + 1e-5).sqrt() * scale + shift

            blocks = leaving[:, own].unflatten(0, (num_blocks, rate))
            projection = model.compressions[index].projection
            summaries = [projection.weight @ block.flatten() + projection.bias for block in blocks]
            for token in arrived:
                query = weights[0] @ normalize(token[own])
                reads = []
                for source in (list(leaving[:, own]), summaries):
                    keys = [(weights[1] @ normalize(state)).view(heads, -1) for state in source]
                    values = [(weights[2] @ normalize(state)).view(heads, -1) for state in source]
                    for head in range(heads):
                        scores = torch.stack([query.view(heads, -1)[head] @ key[head] for key in keys])
                        attention = (scores / math.sqrt(16 / heads)).softmax(0)
                        reads.append(sum(a * value[head] for a, value in zip(attention, values, strict=True)))
                difference = torch.cat(reads[heads:]) - torch.cat(reads[:heads])
                total = total + difference.square().mean()
    return total


def compression_gradients(model):
    return [parameter.grad.clone() for parameter in model.compressions.parameters()]


def test_the_reconstruction_loss_matches_the_algorithm_and_trains_only_the_compression():
    model = tiny_baseline("compressive")
    memory = model.initial_memory(B)
    for seed, counts in enumerate(([6, 6, 2], [6, 3, 0])):
        padding = torch.arange(6) >= torch.tensor(counts)[:, None]
        _, memory = model.encode(tokens(B, 6, seed=seed), memory=memory, padding_mask=padding)
    segment, padding = tokens(B, 6, seed=5), torch.arange(6) >= torch.tensor([5, 4, 3])[:, None]
    expected = reconstruction_by_hand(model, segment, padding, memory)
    expected.backward()
    expected_grads = compression_gradients(model)
    model.zero_grad()
    loss = AuxiliaryLoss()
    entering = memory.requires_grad_()
    hidden, next_memory = model.encode(segment, memory=entering, padding_mask=padding, auxiliary=loss)
    plain, plain_memory = model.encode(segment, memory=memory, padding_mask=padding)
    assert torch.equal(hidden, plain)
    assert torch.equal(next_memory, plain_memory)
    assert expected > 0.01
    assert_close(loss.total, expected)
    loss.total.backward()
    for grad, expected_grad in zip(compression_gradients(model), expected_grads, strict=True):
        assert grad.norm() > 0
        assert_close(grad, expected_grad)
    assert entering.grad is None
    others = (p for name, p in model.named_parameters() if "compression" not in name)
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_training_adds_the_weighted_mean_reconstruction_loss_and_does_not_report_it(method):
    rollout = random_rollout(5, B, resets=True, padding=True)
    results = {}
    for weight in (0.0, 0.5, 1.0):
        model = tiny_baseline("compressive", reconstruction_weight=weight)
        memory = used_memory(model, B)
        results[weight] = backpropagate(model, rollout, memory=memory, method=method), model
    aligned, state, total = model.align_inputs(rollout), memory, 0.0
    reference = tiny_baseline("compressive")
    for t in range(5):
        state = reference.reset_memory(state, aligned.reset[t])
        loss = AuxiliaryLoss()
        padding = aligned.input_padding[t]
        _, state = reference.encode(aligned.inputs[t], memory=state, padding_mask=padding, auxiliary=loss)
        total = total + loss.total
    (total / (~aligned.input_padding).sum()).backward()
    expected = compression_gradients(reference)
    for weight in (0.5, 1.0):
        result, model = results[weight]
        assert_close(result.loss, results[0.0][0].loss)
        for grad, expected_grad in zip(compression_gradients(model), expected, strict=True):
            assert expected_grad.norm() > 1e-3
            assert_close(grad, weight * expected_grad)
        for (name, p), q in zip(model.named_parameters(), results[0.0][1].parameters(), strict=True):
            if "compression" not in name:
                assert_close(p.grad, q.grad)
    assert all(p.grad is None for p in results[0.0][1].compressions.parameters())


def test_a_rollout_without_compression_has_no_reconstruction_loss():
    model = tiny_baseline("compressive", memory_length=60)
    rollout = Rollout(inputs=tokens(2, SEGMENT_LENGTH)[None], targets=tokens(2, SEGMENT_LENGTH, seed=3)[None])
    backpropagate(model, rollout)
    assert all(p.grad is None or p.grad.norm() == 0 for p in model.compressions.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
