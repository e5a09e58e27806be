"""Memory reader, writer and normalization, compared with loops that implement the paper's equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from memformer.errors import InputError
from memformer.nn import AttentionRecord, AuxiliaryLoss, MemoryNormalization, MemoryReader, MemoryWriter
from tests.helpers import assert_close

B, K, S, D, H = 2, 4, 5, 12, 3
ALL_WRITTEN = torch.ones(B, H, K, 1)
TERMINAL = torch.ones(K, D)  # used only with a free-slot bias


def write_by_hand(writer, memory, hidden, padding):
    """m_i' = softmax([q_i.k_i ; q_i K_x] / (sqrt(d_h) tau)) [m_i ; V_x], one slot and one head at a time."""
    if writer.token_projection is not None:
        hidden = hidden @ writer.token_projection.weight.mT
    width = memory.shape[-1] // writer.num_heads
    result = torch.zeros_like(memory)
    for b in range(memory.shape[0]):
        for i in range(memory.shape[1]):
            for h in range(writer.num_heads):
                part = slice(h * width, (h + 1) * width)
                query = (writer.query.weight @ memory[b, i])[part]
                keys = [(writer.key.weight @ memory[b, i])[part]]
                values = [memory[b, i, part]]
                for s in range(hidden.shape[1]):
                    if padding is None or not padding[b, s]:
                        keys.append((writer.key.weight @ hidden[b, s])[part])
                        values.append((writer.value.weight @ hidden[b, s])[part])
                scores = torch.stack(keys) @ query / (math.sqrt(width) * writer.temperature)
                result[b, i, part] = scores.softmax(0) @ torch.stack(values)
    return result


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", [D, 6])
def test_writer_matches_the_papers_equation(num_heads, padded, width):
    writer = MemoryWriter(width, token_width=D, num_heads=num_heads, temperature=0.25).double()
    assert (writer.token_projection is None) == (width == D)
    memory, hidden = torch.randn(B, K, width).double(), torch.randn(B, S, D).double()
    padding = None
    if padded:
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[0, 3:] = True
    updated, _ = writer(memory, terminal=TERMINAL[:, :width], hidden=hidden, padding_mask=padding)
    assert_close(updated, write_by_hand(writer, memory, hidden, padding))


def test_a_slot_that_attends_only_to_itself_keeps_its_content_exactly():
    writer = MemoryWriter(D, token_width=D, num_heads=H, temperature=0.25)
    memory, hidden = torch.randn(B, K, D), torch.randn(B, S, D)
    everything = torch.ones(B, S, dtype=torch.bool)
    updated, written = writer(memory, terminal=TERMINAL, hidden=hidden, padding_mask=everything)
    assert torch.equal(updated, memory)
    assert torch.equal(written, torch.zeros(B, H, K, 1))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_competing_slots_attend_to_themselves_and_to_their_matched_token(num_heads):
    writer = MemoryWriter(D, token_width=D, num_heads=num_heads, temperature=0.25, competition=True).double()
    memory, hidden = torch.randn(B, K, D).double(), torch.randn(B, S, D).double()
    record = AttentionRecord()
    writer(memory, terminal=TERMINAL, hidden=hidden, record=record)
    width = D // num_heads
    for b in range(B):
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            queries = (memory[b] @ writer.query.weight.T)[:, part] / (math.sqrt(width) * 0.25)
            own = (queries * (memory[b] @ writer.key.weight.T)[:, part]).sum(-1)
            scores = queries @ (hidden[b] @ writer.key.weight.T)[:, part].T
            pairs = greedy_matching((scores - own[:, None]).tolist())
            for i in range(K):
                expected = torch.zeros(1 + S).double()
                if i in pairs:
                    expected[[0, 1 + pairs[i]]] = torch.stack([own[i], scores[i, pairs[i]]]).softmax(0)
                else:
                    expected[0] = 1.0
                assert_close(record.writer[b, h, i], expected)


def greedy_matching(preference):
    """Return the token of each matched slot, from a sorted list of all pairs."""
    ranked = sorted(((value, i, s) for i, row in enumerate(preference) for s, value in enumerate(row)), reverse=True)
    pairs = {}
    for _, i, s in ranked:
        if i not in pairs and s not in pairs.values():
            pairs[i] = s
    return pairs


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_free_slot_bias_lowers_own_scores_by_the_cosine_with_the_terminal_state(num_heads, shared):
    plain = MemoryWriter(D, token_width=D, num_heads=num_heads, temperature=0.25).double()
    biased = MemoryWriter(D, token_width=D, num_heads=num_heads, temperature=0.25, free_slot_bias=2.0).double()
    biased.load_state_dict(plain.state_dict(), strict=False)
    memory, hidden = torch.randn(B, K, D).double(), torch.randn(B, S, D).double()
    terminal = torch.randn(1 if shared else K, D).double()
    before, after = AttentionRecord(), AttentionRecord()
    plain(memory, terminal=terminal, hidden=hidden, record=before)
    biased(memory, terminal=terminal, hidden=hidden, record=after)
    width = D // num_heads
    for b in range(B):
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(K):
                one, other = memory[b, i, part], terminal[0 if shared else i, part]
                odds = before.writer[b, h, i, 0] * torch.exp(-2 * (one @ other) / one.norm() / other.norm())
                rest = before.writer[b, h, i, 1:]
                expected = torch.cat([odds[None], rest]) / (odds + rest.sum())
                assert_close(after.writer[b, h, i], expected)


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("normalizer", ["entmax15", "sparsemax"])
@pytest.mark.parametrize("competition", [False, True])
@pytest.mark.parametrize("is_filler", [None, [True, False]])
def test_the_write_penalty_is_the_excess_over_the_threshold_for_a_write(num_heads, normalizer, competition, is_filler):
    writer = MemoryWriter(
        D, token_width=D, num_heads=num_heads, temperature=0.25, normalizer=normalizer, competition=competition
    )
    writer = writer.double()
    memory, hidden = torch.randn(B, K, D).double(), torch.randn(B, S, D).double()
    padding = torch.arange(S).expand(B, S) >= torch.tensor([[2], [S]])
    width, support_width = D // num_heads, {"entmax15": 2.0, "sparsemax": 1.0}[normalizer]
    expected, best = 0.0, torch.empty(B, num_heads).double()
    for b, h in itertools.product(range(B), range(num_heads)):
        part = slice(h * width, (h + 1) * width)
        scores = []
        for s in torch.nonzero(~padding[b]).flatten().tolist():
            excess = []
            for i in range(K):
                query = (writer.query.weight @ memory[b, i])[part] / (math.sqrt(width) * 0.25)
                own, token = writer.key.weight @ memory[b, i], writer.key.weight @ hidden[b, s]
                excess.append(query @ token[part] - query @ own[part])
            scores.append(max(excess))
        best[b, h] = max(scores)
        for score in scores:
            value = F.relu(score + support_width + 1)
            if is_filler and is_filler[b]:
                expected = expected + 10 * value / num_heads
            elif not is_filler or score < max(scores):  # the best token of a segment that may hold a fact is spared
                expected = expected + torch.log1p(value) / num_heads
    penalty = AuxiliaryLoss(is_filler=None if is_filler is None else torch.tensor(is_filler))
    writer(memory, terminal=TERMINAL, hidden=hidden, padding_mask=padding, auxiliary=penalty)
    assert expected > 0
    assert_close(penalty.total, expected)
    shortfall = F.relu(1 - support_width - best).masked_fill(torch.tensor(is_filler or [False] * B)[:, None], 0.0)
    assert_close(penalty.shortfall, shortfall.sum() / num_heads)


def test_a_write_penalty_of_zero_means_that_nothing_is_written():
    writer = MemoryWriter(D, token_width=D, num_heads=1, temperature=0.25, normalizer="entmax15").double()
    memory, hidden = torch.randn(B, K, D).double(), torch.randn(B, S, D).double()
    with torch.no_grad():
        writer.key.weight.copy_(writer.query.weight)  # a slot's own score is its query's square, never negative
        hidden *= 1e-3
    penalty, record = AuxiliaryLoss(), AttentionRecord()
    memory *= 10
    writer(memory, terminal=TERMINAL, hidden=hidden, record=record, auxiliary=penalty)
    assert penalty.total == 0
    assert (record.writer[..., 0] == 1).all()
    own = ((memory @ writer.query.weight.mT) * (memory @ writer.key.weight.mT)).sum(dim=-1) / math.sqrt(D) / 0.25
    token = (memory @ writer.query.weight.mT) @ (hidden @ writer.key.weight.mT).mT / math.sqrt(D) / 0.25
    shortfall = -1 - (token - own[..., None]).amax(dim=(1, 2))
    assert (shortfall > 0).all()
    assert_close(penalty.shortfall, shortfall.sum())
    # A row without tokens falls short of nothing.
    padding = torch.tensor([[False] * S, [True] * S])
    writer(memory, terminal=TERMINAL, hidden=hidden, padding_mask=padding, auxiliary=penalty)
    assert_close(penalty.shortfall, shortfall[0])


def test_a_write_penalty_with_the_softmax_is_refused():
    writer = MemoryWriter(D, token_width=D, num_heads=1, temperature=0.25)
    memory, hidden = torch.randn(B, K, D), torch.randn(B, S, D)
    with pytest.raises(
        InputError,
        match=r"write_normalizer \('softmax'\) writes every token; a write penalty needs a sparse normalizer",
    ):
        writer(memory, terminal=TERMINAL, hidden=hidden, auxiliary=AuxiliaryLoss())


def test_record_of_the_writer_sums_to_one_and_gives_the_result():
    writer = MemoryWriter(D, token_width=D, num_heads=H, temperature=0.25).double()
    memory, hidden = torch.randn(B, K, D).double(), torch.randn(B, S, D).double()
    record = AttentionRecord()
    result, written = writer(memory, terminal=TERMINAL, hidden=hidden, record=record)
    assert record.writer.shape == (B, H, K, 1 + S)
    assert_close(record.writer.sum(-1), torch.ones(B, H, K).double())
    assert torch.equal(written, 1 - record.writer[..., :1])
    values = writer.value(hidden).unflatten(-1, (H, -1)).transpose(1, 2)
    own = memory.unflatten(-1, (H, -1)).transpose(1, 2)
    rebuilt = record.writer[..., :1] * own + record.writer[..., 1:] @ values
    assert_close(rebuilt.transpose(1, 2).flatten(2), result)


def test_record_of_the_reader_sums_to_one_and_changes_nothing():
    reader = MemoryReader(D, slot_width=D, num_heads=H, dropout=0.0).double()
    hidden, slots = torch.randn(B, S, D).double(), torch.randn(B, K, D).double()
    record = AttentionRecord()
    assert torch.equal(reader(hidden, slots=slots, record=record), reader(hidden, slots=slots))
    (weights,) = record.reader
    assert weights.shape == (B, H, S, K)
    assert_close(weights.sum(-1), torch.ones(B, H, S).double())


def test_normalization_matches_the_papers_equation():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.01)).double()
    memory = torch.randn(B, K, D).double()
    result = normalization(memory, written=torch.rand(B, H, K, 1).double())
    for b in range(B):
        for i in range(K):
            moved = memory[b, i] + normalization.slot_bias[i]
            assert_close(result[b, i], math.sqrt(D) * moved / moved.norm())


def test_unwritten_slots_stay_on_the_sphere_and_decay_to_their_terminal_state():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.05)).double()
    memory = torch.randn(B, K, D).double()
    with torch.no_grad():
        for _ in range(2000):
            memory = normalization(memory, written=ALL_WRITTEN.double())
            assert_close(memory.norm(dim=-1), torch.full((B, K), math.sqrt(D), dtype=torch.float64))
    assert_close(memory, normalization.initial_memory(B).detach(), relative=1e-6)


def test_forgetting_speeds_are_spread_log_uniformly_or_all_the_same():
    spread = MemoryNormalization(5, width=D, forgetting_speeds=(0.3, 3e-5))
    speeds = spread.slot_bias.norm(dim=-1) / math.sqrt(D)
    assert torch.allclose(speeds, torch.tensor([0.3, 0.03, 0.003, 0.0003, 0.00003]), rtol=1e-4)
    single = MemoryNormalization(5, width=D, forgetting_speeds=(0.1, 0.1))
    assert torch.allclose(single.slot_bias.norm(dim=-1) / math.sqrt(D), torch.full((5,), 0.1))


def test_exchangeable_slots_share_one_vector_and_its_speed():
    normalization = MemoryNormalization(64, width=512, forgetting_speeds=(0.1, 0.1), exchangeable=True)
    assert normalization.slot_bias.shape == (1, 512)
    assert torch.allclose(normalization.slot_bias.norm(), torch.tensor(0.1 * 512**0.5))
    memory = normalization.initial_memory(2)
    assert memory.shape == (2, 64, 512)
    assert torch.equal(memory, memory[:1, :1].expand_as(memory))


def test_without_forgetting_a_slot_does_not_change():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.05), forgetting=False).double()
    written = ALL_WRITTEN.double()
    memory = normalization(torch.randn(B, K, D).double(), written=written)
    assert_close(normalization(memory, written=written), memory)


def test_forgetting_only_when_written_is_scaled_by_the_written_share_of_each_head():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.01), only_when_written=True).double()
    memory, written = torch.randn(B, K, D).double(), torch.rand(B, H, K, 1).double()
    result = normalization(memory, written=written)
    for b in range(B):
        for i in range(K):
            share = written[b, :, i].repeat_interleave(D // H)
            moved = memory[b, i] + share * normalization.slot_bias[i]
            assert_close(result[b, i], math.sqrt(D) * moved / moved.norm())


def test_forgetting_only_when_written_keeps_an_unwritten_slot_forever():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.01), only_when_written=True)
    memory = first = normalization(torch.randn(B, K, D), written=ALL_WRITTEN).detach()
    with torch.no_grad():
        for _ in range(1000):
            memory = normalization(memory, written=torch.zeros(B, H, K, 1))
    assert torch.equal(memory, first)


@pytest.mark.parametrize("options", [{"only_when_written": True}, {"forgetting": False}])
def test_the_gradient_of_an_unwritten_slot_is_that_of_one_normalized_again(options):
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 0.01), **options).double()
    unwritten, weights = torch.zeros(B, H, K, 1).double(), torch.randn(B, K, D).double()
    written = torch.randn(B, K, D).double().requires_grad_()
    slots = normalization(written, written=ALL_WRITTEN.double())
    kept = normalization(slots, written=unwritten)
    again = normalization.radius * F.normalize(slots, dim=-1)
    gradients = [torch.autograd.grad((each * weights).sum(), written, retain_graph=True)[0] for each in (kept, again)]
    assert_close(*gradients)


def test_random_input_for_many_timesteps_leaves_the_memory_finite_and_on_its_sphere():
    writer = MemoryWriter(D, token_width=D, num_heads=H, temperature=0.25)
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(0.3, 1e-5))
    memory = normalization.initial_memory(1).detach()
    with torch.no_grad():
        for _ in range(500):
            updated, written = writer(memory, terminal=TERMINAL, hidden=10 * torch.randn(1, S, D))
            memory = normalization(updated, written=written)
    assert memory.isfinite().all()
    assert torch.allclose(memory.norm(dim=-1), torch.full((1, K), math.sqrt(D)))


@pytest.mark.parametrize("options", [{}, {"only_when_written": True}, {"log_speeds": True}, {"exchangeable": True}])
def test_the_share_left_is_that_of_the_written_slot_in_the_sum(options):
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(2.0, 2.0), **options)
    memory, written = torch.randn(B, K, D), torch.rand(B, H, K, 1)
    left = normalization.share_left(memory, written=written)
    for b in range(B):
        for i in range(K):
            added = normalization.forgetting_vectors()[0 if "exchangeable" in options else i]
            if "only_when_written" in options:
                added = (written[b, :, i] * added.view(H, -1)).flatten()
            assert left[b, i].item() == pytest.approx(
                (memory[b, i].norm() / (memory[b, i].norm() + added.norm())).item()
            )
    assert normalization.share_left(torch.zeros(B, K, D), written=torch.zeros_like(written)).eq(0).all()


def test_without_forgetting_all_of_a_slot_is_left():
    normalization = MemoryNormalization(K, width=D, forgetting_speeds=(2.0, 2.0), forgetting=False)
    assert normalization.share_left(torch.randn(B, K, D), written=ALL_WRITTEN).eq(1).all()
