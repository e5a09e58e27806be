"""Attention and position schemes, compared with explicit loops."""

import math

import pytest
import torch

from memformer.nn.attention import CrossAttention, SelfAttention, keep_mask_of
from memformer.nn.positions import Frame, RelativePositions, RotaryPositions
from tests.helpers import assert_close

B, S, D, H = 2, 5, 12, 3
W = D // H


def sinusoid(distance):
    vector = torch.zeros(D).double()
    for pair in range(D // 2):
        angle = distance * 10_000.0 ** (-2 * pair / D)
        vector[2 * pair], vector[2 * pair + 1] = math.sin(angle), math.cos(angle)
    return vector


def rotated(vector, position):
    """Return the vector with pairs (i, i + half) rotated by position * 10000^(-i/half)."""
    half = W // 2
    result = vector.clone()
    for i in range(half):
        angle = position * 10_000.0 ** (-i / half)
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def self_attention_by_hand(attention, x, *, kind, positions, keep):
    result = torch.zeros_like(x)
    projected = attention.query_key_value(x)
    for b in range(B):
        read = torch.zeros(S, D).double()
        for h in range(H):
            part = slice(h * W, (h + 1) * W)
            q, k, v = (projected[b, :, i * D : (i + 1) * D][:, part] for i in range(3))
            for i in range(S):
                scores, values = [], []
                for j in range(S):
                    if not keep(b, i, j):
                        continue
                    distance = int(positions[b, i] - positions[b, j])
                    if kind == "rotary":
                        score = rotated(q[i], int(positions[b, i])) @ rotated(k[j], int(positions[b, j]))
                        value = v[j]
                    else:
                        vector = sinusoid(distance)[part]
                        score, value = q[i] @ (k[j] + vector), v[j] + vector
                    scores.append(score / math.sqrt(W))
                    values.append(value)
                read[i, part] = torch.stack(scores).softmax(0) @ torch.stack(values)
        result[b] = attention.output(read)
    return result


@pytest.mark.parametrize("kind", ["rotary", "relative"])
@pytest.mark.parametrize("masking", ["none", "padding", "causal"])
def test_self_attention_matches_the_equation(kind, masking):
    scheme = (
        RotaryPositions(head_width=W) if kind == "rotary" else RelativePositions(num_heads=H, head_width=W, longest=9)
    )
    attention = SelfAttention(D, num_heads=H, dropout=0.0, bias=scheme.biased_projections).double()
    x = torch.randn(B, S, D).double()
    positions = torch.arange(S).expand(B, S)
    padding = None
    if masking == "padding":
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[1, :2] = True
        positions = (~padding).cumsum(-1) - 1
    frame = scheme(positions, key_positions=positions)
    actual = attention(x, frame=frame, keep_mask=keep_mask_of(padding), is_causal=masking == "causal")

    def keep(b, i, j):
        return (padding is None or not padding[b, j]) and (masking != "causal" or j <= i)

    assert_close(actual, self_attention_by_hand(attention, x, kind=kind, positions=positions, keep=keep))


@pytest.mark.parametrize("kind", ["rotary", "relative"])
def test_only_differences_of_positions_matter(kind):
    scheme = (
        RotaryPositions(head_width=W) if kind == "rotary" else RelativePositions(num_heads=H, head_width=W, longest=9)
    )
    attention = CrossAttention(D, num_heads=H, dropout=0.0, bias=scheme.biased_projections).double()
    x, source = torch.randn(B, S, D).double(), torch.randn(B, S + 2, D).double()
    results = []
    for shift in (0, 17):
        frame = scheme(torch.arange(S) + shift, key_positions=torch.arange(-S - 2, 0) + shift)
        key, value = attention.project(source, frame=frame)
        results.append(attention(x, key=key, value=value, frame=frame))
    assert_close(results[1], results[0])


def test_relative_positions_have_the_papers_number_of_parameters():
    attention = SelfAttention(512, num_heads=8, dropout=0.0, bias=RelativePositions.biased_projections)
    count = sum(p.numel() for p in attention.parameters())
    assert round(count / 1e6, 2) == 1.05  # v1: 1.05 M, compared with 1.32 M of Transformer-XL


def test_an_all_padding_row_is_finite_with_finite_gradient():
    scheme = RotaryPositions(head_width=W)
    attention = SelfAttention(D, num_heads=H, dropout=0.0, bias=False)
    x = torch.randn(B, S, D, requires_grad=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0] = True
    positions = (~padding).cumsum(-1) - 1
    result = attention(x, frame=scheme(positions, key_positions=positions), keep_mask=keep_mask_of(padding))
    result[1].sum().backward()
    assert result.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad[0].norm() == 0


@pytest.mark.parametrize("num_keys", [5, 12, 2000], ids=["fewer", "as many", "too many for unfused attention"])
@pytest.mark.parametrize("masking", ["nothing", "causal", "padding", "causal and padding"])
def test_bfloat16_attention_on_a_cpu_matches_float32(num_keys, masking):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, 12, 8), (2, 2, num_keys, 8), (2, 2, num_keys, 8)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    padding = torch.zeros(2, num_keys, dtype=torch.bool)
    padding[1, 3:] = True
    keep_mask = keep_mask_of(padding) if "padding" in masking else None
    if "causal" in masking and keep_mask is not None:
        # The fused kernel accepts only one of the two.
        keep_mask = keep_mask & torch.ones(12, num_keys, dtype=torch.bool).tril()

    def attend(dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        result = Frame().attend(*leaves, keep_mask=keep_mask, is_causal=masking == "causal")
        weight = torch.arange(result.numel()).view_as(result) % 7 - 3.0
        (result * weight).sum().backward()
        return [result, *(leaf.grad for leaf in leaves)]

    for ours, exact in zip(attend(torch.bfloat16), attend(torch.float32), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).abs().max() <= 0.03 * exact.abs().max()


def test_bfloat16_attention_applies_dropout_to_weights():
    query, key = torch.ones(1, 1, 1, 8).bfloat16(), torch.ones(1, 1, 500, 8).bfloat16()
    value = torch.eye(500).bfloat16()[None, None]
    torch.manual_seed(0)
    weights = Frame().attend(query, key, value, dropout=0.4).float() * 500
    assert 0.3 < (weights == 0).float().mean() < 0.5
    assert weights[weights > 0].mean() == pytest.approx(1 / 0.6, rel=0.02)
