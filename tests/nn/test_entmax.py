"""Softmax and its sparse alternatives: defining properties and gradients."""

import pytest
import torch

from memformer.nn.entmax import normalize_scores


@pytest.fixture
def scores():
    return 2 * torch.randn(5, 9, dtype=torch.float64)


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15", "sparsemax"])
def test_weights_sum_to_one_and_ignore_shifts_and_minus_infinity(normalizer, scores):
    weights = normalize_scores(scores, normalizer)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(normalize_scores(scores + 7, normalizer), weights)
    masked = torch.cat([scores, torch.full((5, 2), float("-inf"), dtype=torch.float64)], dim=-1)
    torch.testing.assert_close(normalize_scores(masked, normalizer)[:, :-2], weights)


@pytest.mark.parametrize(("normalizer", "alpha"), [("entmax15", 1.5), ("sparsemax", 2.0)])
def test_weights_satisfy_the_optimality_conditions(normalizer, alpha, scores):
    # p_i^(alpha-1) = max(0, (alpha-1) z_i - tau) with one tau for all; together with the sum of 1 this determines p.
    weights = normalize_scores(scores, normalizer)
    assert (weights == 0).any()
    taus = (alpha - 1) * scores - weights ** (alpha - 1)
    for tau, weight, score in zip(taus, weights, (alpha - 1) * scores, strict=True):
        torch.testing.assert_close(tau[weight > 0], tau[weight > 0].mean().expand(int((weight > 0).sum())))
        assert (score[weight == 0] <= tau[weight > 0].mean() + 1e-12).all()


@pytest.mark.parametrize("normalizer", ["entmax15", "sparsemax"])
def test_the_gradient_matches_finite_differences(normalizer, scores):
    assert torch.autograd.gradcheck(lambda z: normalize_scores(z, normalizer), scores.requires_grad_())


@pytest.mark.parametrize("normalizer", ["entmax15", "sparsemax"])
def test_second_derivatives_match_finite_differences(normalizer, scores):
    assert (normalize_scores(scores, normalizer) == 0).any()
    assert torch.autograd.gradgradcheck(lambda z: normalize_scores(z, normalizer), scores.requires_grad_())


@pytest.mark.parametrize("normalizer", ["entmax15", "sparsemax"])
def test_a_clearly_highest_score_gets_weight_exactly_one(normalizer):
    weights = normalize_scores(torch.tensor([[5.0, 0.0, -1.0, float("-inf")]]), normalizer)
    assert weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]
