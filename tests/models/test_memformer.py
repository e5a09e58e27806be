"""Properties of the Memformer: rows and padding are independent, the likelihood is causal, details of the paper."""

import math

import pytest
import torch

from memformer import AttentionRecord, InputError, InputTypeError, Memformer, Session
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_config, tiny_model

B, S = 3, SEGMENT_LENGTH


def tokens(batch_size=B, length=S, seed=2):
    return torch.randint(0, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def written(model, batch_size=B):
    """Return a memory that has been written to, so that rows and slots differ."""
    with torch.no_grad():
        return model.encode(tokens(batch_size, seed=9), memory=model.initial_memory(batch_size))[1]


def real_hidden(hidden, length):
    """Return the hidden states of the first tokens, and the extra state that may follow the segment."""
    return torch.cat([hidden[:, :length], hidden[:, S:]], dim=1)


def test_a_padded_row_equals_the_unpadded_one(variant):
    model = tiny_model(**variant)
    memory, segment, targets = written(model), tokens(), tokens(seed=3)
    for length in (1, 4):
        alone, alone_memory = model.encode(segment[:, :length], memory=memory)
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[:, length:] = True
        padded, padded_memory = model.encode(segment, memory=memory, padding_mask=padding)
        assert_close(padded_memory, alone_memory)
        assert_close(real_hidden(padded, length), alone)
        assert_close(
            model.decode(targets, hidden=padded, hidden_padding_mask=padding), model.decode(targets, hidden=alone)
        )


def test_padding_on_the_left_equals_padding_on_the_right(variant):
    model = tiny_model(**variant)
    memory, segment, targets = written(model), tokens(), tokens(seed=3)
    right = torch.zeros(B, S, dtype=torch.bool)
    right[:, 4:] = True
    hidden, next_memory = model.encode(segment, memory=memory, padding_mask=right)
    expected = model.decode(targets, hidden=hidden, hidden_padding_mask=right)
    left = right.flip(1)
    hidden, left_memory = model.encode(segment.roll(2, dims=1), memory=memory, padding_mask=left)
    assert_close(left_memory, next_memory)
    assert_close(model.decode(targets, hidden=hidden, hidden_padding_mask=left), expected)


def test_an_all_padding_row_changes_neither_its_memory_nor_other_rows(variant):
    model = tiny_model(**variant)
    memory, segment = written(model), tokens()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    hidden, next_memory = model.encode(segment, memory=memory, padding_mask=padding)
    assert torch.equal(next_memory[1], memory[1])
    assert hidden.isfinite().all()
    expected_hidden, expected_memory = model.encode(segment, memory=memory)
    assert_close(next_memory[[0, 2]], expected_memory[[0, 2]])
    assert_close(hidden[[0, 2]], expected_hidden[[0, 2]])


def test_rows_of_a_batch_are_independent(variant):
    model = tiny_model(**variant)
    memory, segment, targets = written(model), tokens(), tokens(seed=3)
    hidden, next_memory = model.encode(segment, memory=memory)
    logits = model.decode(targets, hidden=hidden)
    for row in range(B):
        one = slice(row, row + 1)
        alone, alone_memory = model.encode(segment[one], memory=memory[one])
        assert_close(alone_memory, next_memory[one])
        assert_close(model.decode(targets[one], hidden=alone), logits[one])


def test_a_reset_row_equals_a_fresh_row(variant):
    model = tiny_model(**variant)
    memory = model.reset_memory(written(model), torch.tensor([True, False, True]))
    hidden, next_memory = model.encode(tokens(), memory=memory)
    fresh, fresh_memory = model.encode(tokens(), memory=model.initial_memory(B))
    assert torch.equal(hidden[[0, 2]], fresh[[0, 2]])
    assert torch.equal(next_memory[[0, 2]], fresh_memory[[0, 2]])
    if model.config.num_slots:
        assert not torch.allclose(hidden[1], fresh[1])


def test_a_target_is_predicted_only_from_earlier_targets(variant):
    model = tiny_model(**variant)
    hidden, _ = model.encode(tokens(), memory=written(model))
    targets = tokens(seed=3)
    logits = model.decode(targets, hidden=hidden)
    for position in range(S):
        changed = targets.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB_SIZE
        difference = (model.decode(changed, hidden=hidden) - logits).abs().amax(dim=(0, 2))
        assert (difference[: position + 1] == 0).all()
        assert (difference[position + 1 :] > 0).all()


def test_the_decoder_depends_on_hidden_states_and_these_depend_on_the_memory():
    model = tiny_model()
    segment, targets = tokens(), tokens(seed=3)
    hidden, _ = model.encode(segment, memory=written(model))
    other, _ = model.encode(segment, memory=model.initial_memory(B))
    assert not torch.allclose(hidden, other)
    assert not torch.allclose(model.decode(targets, hidden=hidden), model.decode(targets, hidden=other))


def test_distance_continues_across_the_segment_boundary():
    # The decoder's view of the past must depend on distances to the segment boundary, not on where the previous segment
    # began. So one more (masked) hidden state in front does not change the logits.
    model = tiny_model()
    hidden, _ = model.encode(tokens(), memory=written(model))
    padding = torch.zeros(B, S + 1, dtype=torch.bool)
    padding[:, 0] = True
    longer = torch.cat([torch.randn_like(hidden[:, :1]), hidden], dim=1)
    targets = tokens(seed=3)
    assert_close(
        model.decode(targets, hidden=longer, hidden_padding_mask=padding), model.decode(targets, hidden=hidden)
    )
    positions = model.precompute_past(hidden).positions
    assert positions.tolist() == [*range(-S, 0), *range(1 - model.config.decoder_start_tokens, 0)]


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_joint_attention_is_causal_attention_over_the_past_and_the_targets(positions):
    model = tiny_model(positions=positions, num_decoder_layers=1, decoder_start_tokens=0)
    layer, num_targets = model.decoder.layers[0], 4
    hidden, x = torch.randn(2, SEGMENT_LENGTH, 16).double(), torch.randn(2, num_targets, 16).double()
    before, own = torch.arange(-SEGMENT_LENGTH, 0), torch.arange(num_targets)
    together = torch.cat([before, own])
    frame = model.decoder.positions(together, key_positions=together)
    sequence = torch.cat([hidden, layer.self_attention_norm(x)], dim=1)
    attended = x + layer.self_attention(sequence, frame=frame, is_causal=True)[:, SEGMENT_LENGTH:]
    expected = attended + layer.feed_forward(layer.feed_forward_norm(attended))
    past = model.decoder.precompute_past(hidden, padding_mask=None)
    features = model.decoder._run_layers(x, past=past, frame=model.decoder.positions(own, key_positions=own))
    assert_close(features, model.decoder.norm(expected))
    assert not [name for name in model.state_dict() if "cross_attention" in name]


def test_token_nll_matches_the_logits():
    model = tiny_model()
    hidden, _ = model.encode(tokens(), memory=model.initial_memory(B))
    targets = tokens(seed=3)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 3:] = True
    nll = model.token_nll(targets, hidden=hidden, target_padding_mask=padding)
    log_probabilities = model.decode(targets, hidden=hidden).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    assert_close(nll, expected.masked_fill(padding, 0.0))


def test_recorded_attention_weights_sum_to_one_and_recording_changes_nothing(variant):
    model = tiny_model(**variant)
    record = AttentionRecord()
    memory = written(model)
    hidden, next_memory = model.encode(tokens(), memory=memory, attention=record)
    plain_hidden, plain_memory = model.encode(tokens(), memory=memory)
    assert torch.equal(hidden, plain_hidden)
    assert torch.equal(next_memory, plain_memory)
    if not model.config.num_slots:
        assert record == AttentionRecord()
        return
    assert len(record.reader) == model.config.num_encoder_layers
    for weights in (*record.reader, record.writer):
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_record_that_is_used_again_holds_one_timestep():
    model, record = tiny_model(), AttentionRecord()
    model.encode(tokens(), memory=written(model), attention=record)
    first = record.reader
    model.encode(tokens(), attention=record)
    assert len(record.reader) == len(first) == model.config.num_encoder_layers
    assert not torch.equal(record.reader[0], first[0])


def test_padding_between_tokens_is_refused():
    mask = torch.zeros(B, SEGMENT_LENGTH, dtype=torch.bool)
    for padded in (slice(0, 2), slice(4, None), slice(None)):
        tiny_model().encode(tokens(), padding_mask=mask.index_fill(1, torch.arange(SEGMENT_LENGTH)[padded], True))
    mask[1, 2] = True
    with pytest.raises(InputError, match="padding_mask is True between tokens of a row"):
        tiny_model().encode(tokens(), padding_mask=mask)
    mask[1, 0] = True
    with pytest.raises(InputError, match="padding_mask is True between tokens of a row"):
        tiny_model().encode(tokens(), padding_mask=mask)


def test_a_hook_on_the_decoder_acts_in_every_readout():
    model = tiny_model().eval()
    model.decoder.register_forward_hook(lambda module, given, features: 1.5 * features)
    session = Session(model)
    session.feed([1, 2])
    nll = -session.next_token_logits().log_softmax(dim=-1)[0, 3]
    assert_close(nll, Session(model).score([1, 2, 3])[-1])


def test_every_dropout_acts_in_training_only():
    segment = tokens()
    for options in ({"dropout": 0.5, "attention_dropout": 0.0}, {"attention_dropout": 0.5}):
        model = tiny_model(**options).train()
        memory = model.initial_memory(B)
        first, second = (model.encode(segment, memory=memory)[0] for _ in range(2))
        assert not torch.allclose(first, second)
        model.eval()
        first, second = (model.encode(segment, memory=memory)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_output_projection_shares_the_embedding_without_bos():
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    assert not any("output_projection" in name or "logits" in name for name in names)
    assert model.embedding.weight.shape == (VOCAB_SIZE + 1, 16)
    logits = model.decode(tokens(), hidden=model.encode(tokens(), memory=model.initial_memory(B))[0])
    assert logits.shape == (B, S, VOCAB_SIZE)


def test_initial_memory_is_the_terminal_state_in_float32_or_better():
    model = tiny_model()
    assert model.initial_memory(2).dtype == torch.float64
    assert model.float().initial_memory(2).dtype == torch.float32
    assert model.bfloat16().initial_memory(2).dtype == torch.float32
    norms = model.float().initial_memory(2).norm(dim=-1)
    assert torch.allclose(norms, torch.full((2, 5), math.sqrt(16)))


@pytest.mark.parametrize("slot_width", [64, 32, 128])
def test_content_addressing_starts_with_tokens_that_attend_to_slots_with_their_content(slot_width):
    """Each slot holds one token as the first reader sees it; that token must attend to it most."""
    changes = {"d_model": 64, "num_encoder_layers": 1, "num_slots": VOCAB_SIZE, "slot_width": slot_width}
    found = {}
    for content_addressing in (True, False):
        model = tiny_model(**changes, content_addressing=content_addressing)
        reader = model.encoder.layers[0].memory_reader.attention
        contents = torch.nn.functional.layer_norm(model.embedding.weight[:VOCAB_SIZE], (64,))
        projection = model.memory_writer.token_projection
        slots = contents if projection is None else projection(contents)
        keys, _ = reader.key_value(torch.nn.functional.layer_norm(slots, (slot_width,))).chunk(2, dim=-1)
        query = reader.query(contents).unflatten(-1, (2, 32))
        scores = torch.einsum("qhw,khw->hqk", query, keys.unflatten(-1, (2, 32)))
        found[content_addressing] = (scores.argmax(-1) == torch.arange(VOCAB_SIZE)).double().mean()
        copies = torch.equal(model.memory_writer.value(slots), slots)
        assert copies == content_addressing
    # A projection to fewer dimensions keeps the contents apart only nearly.
    assert found[True] >= (0.9 if slot_width == 32 else 1.0)
    assert found[False] < 0.5


@pytest.mark.parametrize("slot_width", [None, 16, 32, 128, 256])
def test_a_token_scores_its_own_content_as_highly_in_slots_of_any_width(slot_width):
    """As a query it has this score for a key of the slot that holds it; the paper's width is 64 here."""
    model = tiny_model(d_model=64, slot_width=slot_width, content_addressing=True)
    reader = model.encoder.layers[0].memory_reader.attention
    contents = torch.nn.functional.layer_norm(torch.randn(500, 64, dtype=torch.float64), (64,))
    projection = model.memory_writer.token_projection
    slots = contents if projection is None else projection(contents)
    query = reader.query.weight @ contents.T
    key = reader.key_value.weight[:64] @ torch.nn.functional.layer_norm(slots, slots.shape[-1:]).T
    score = (query * key).sum(dim=0) / query.square().sum(dim=0)
    assert score.mean().item() == pytest.approx(1.0, rel=0.1)


def test_narrow_slots_addressed_by_content_can_be_made_in_half_precision():
    fields = {"d_model": 64, "slot_width": 16, "content_addressing": True}
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Memformer(tiny_config(**fields))
        finally:
            torch.set_default_dtype(torch.float32)
    weight = model.memory_writer.token_projection.weight
    assert weight.dtype == torch.bfloat16
    assert_close(weight.float() @ weight.float().T, torch.eye(16), relative=0.02)


def test_unwritten_slots_of_a_model_in_half_precision_stay_at_the_initial_memory():
    """Forgetting moves a slot towards the initial memory, which must not move itself, whatever the weights' dtype."""
    forgetting = tiny_model().bfloat16().memory_normalization
    initial = memory = forgetting.initial_memory(1)
    written = torch.zeros(1, 2, 5, 1)
    for _ in range(2000):
        memory = forgetting(memory, written=written)
    assert_close(memory, initial, relative=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_content_addressing_starts_with_a_convolution_that_adds_preceding_tokens(kernel):
    convolution = tiny_model(content_addressing=True, convolution_kernel=kernel).encoder.convolution
    x = torch.randn(1, 16, 9).double()
    before = torch.stack([x[..., max(0, t - kernel // 2) : t + 1].sum(-1) for t in range(9)], dim=-1)
    assert_close(convolution(x), before + convolution.bias[:, None])


EXCHANGEABLE = {"write_competition": True, "exchangeable_slots": True, "forgetting_speeds": (0.1, 0.1)}


def test_the_order_of_exchangeable_slots_does_not_matter():
    model = tiny_model(**EXCHANGEABLE)
    memory = model.initial_memory(B).detach()
    for _ in range(2):
        _, memory = model.encode(tokens(), memory=memory)
    order = torch.randperm(memory.shape[1])
    segment = tokens()
    hidden, next_memory = model.encode(segment, memory=memory)
    hidden_of_permuted, permuted = model.encode(segment, memory=memory[:, order])
    assert_close(hidden_of_permuted, hidden)
    assert_close(permuted, next_memory[:, order])


def test_the_number_of_exchangeable_slots_can_change_after_training(tmp_path):
    model = tiny_model(**EXCHANGEABLE).float().eval()
    model.save_pretrained(tmp_path / "exchangeable")
    for num_slots in (2, 5, 12):
        resized = Memformer.from_pretrained(tmp_path / "exchangeable", num_slots=num_slots)
        assert resized.initial_memory(B).shape[1] == resized.config.num_slots == num_slots
        assert all(torch.equal(a, b) for a, b in zip(resized.parameters(), model.parameters(), strict=True))
    with pytest.raises(InputError, match=r"num_slots \(0\) must be at least 1"):
        Memformer.from_pretrained(tmp_path / "exchangeable", num_slots=0)
    tiny_model().save_pretrained(tmp_path / "own")
    message = r"num_slots \(12\) must be 5, as in training; only a model with exchangeable_slots"
    with pytest.raises(InputError, match=message):
        Memformer.from_pretrained(tmp_path / "own", num_slots=12)


def test_errors_name_wrong_tokens_and_memories():
    model = tiny_model()
    memory = model.initial_memory(B)
    hidden, _ = model.encode(tokens(), memory=memory)
    with pytest.raises(InputError, match="segment holds token id 12; valid ids are 0 to 11"):
        model.encode(torch.full((B, S), 12), memory=memory)
    with pytest.raises(InputError, match="segment holds token id -1"):
        model.encode(torch.full((B, S), -1), memory=memory)
    with pytest.raises(InputError, match="targets holds token id 11; valid ids are 0 to 10"):
        model.decode(torch.full((B, S), 11), hidden=hidden)
    message = "targets holds token id -100; .*; mask targets that are not counted with target_padding"
    with pytest.raises(InputError, match=message):
        model.decode(torch.full((B, S), -100), hidden=hidden)
    with pytest.raises(NotImplementedError, match="a Memformer cannot be called directly; use encode"):
        model(tokens())
    with pytest.raises(InputError, match="at least one token"):
        model.encode(torch.zeros(B, 0, dtype=torch.int64), memory=memory)
    with pytest.raises(InputError, match="it may be the memory of another model"):
        model.encode(tokens(), memory=memory[:, :3])
    with pytest.raises(InputTypeError, match="memory has dtype torch.float32"):
        model.encode(tokens(), memory=memory.float())


def test_no_memory_is_the_initial_memory(variant):
    model = tiny_model(**variant).eval()
    given = model.encode(tokens(), memory=model.initial_memory(B))
    assert all(torch.equal(left, right) for left, right in zip(model.encode(tokens()), given, strict=True))


def test_a_segment_longer_than_the_position_embedding_is_refused():
    message = f"segment has {S + 1} tokens per row; with position_embedding it must have at most {S}"
    with pytest.raises(InputError, match=message):
        tiny_model(position_embedding=True).encode(torch.zeros(B, S + 1, dtype=torch.int64))


@torch.no_grad()
def test_no_rows_are_read(variant):
    model = tiny_model(**variant)
    hidden, memory = model.encode(torch.zeros(0, SEGMENT_LENGTH, dtype=torch.int64), memory=model.initial_memory(0))
    assert hidden.shape[0] == memory.shape[0] == 0
