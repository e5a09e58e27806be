"""Tied and adaptive embeddings: a normalized distribution, tied weights, and fewer parameters for rare words."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from memformer import InputError, Memformer, backpropagate
from memformer.nn import vocabulary
from memformer.nn.vocabulary import AdaptiveEmbedding, TiedEmbedding
from tests.helpers import VOCAB_SIZE, assert_close, random_rollout, tiny_config, tiny_model

CUTOFFS = (4, 8)


def adaptive_embedding():
    return AdaptiveEmbedding(VOCAB_SIZE, 16, cutoffs=CUTOFFS).double()


def test_probabilities_match_two_softmax_steps_by_hand():
    embedding = adaptive_embedding()
    features = torch.randn(2, 3, 16, dtype=torch.float64)
    head, tail = embedding.softmax.head.weight, embedding.softmax.tail
    first_step = (features @ head.T).softmax(dim=-1)  # four words and one entry for each of the two clusters
    expected = [first_step[..., :4]]
    for index, (narrow, wide) in enumerate(tail):
        within = (features @ narrow.weight.T @ wide.weight.T).softmax(dim=-1)
        expected.append(first_step[..., 4 + index, None] * within)
    expected = torch.cat(expected, dim=-1)
    assert_close(embedding.logits(features).exp(), expected)
    assert_close(expected.sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    targets = torch.randint(0, VOCAB_SIZE, (2, 3))
    assert_close(embedding.nll(features, targets), -expected.log().gather(-1, targets[..., None])[..., 0])


def test_input_and_output_vectors_of_a_word_are_tied():
    # The score of a rare word within its cluster is the product of the features with its embedding.
    embedding = adaptive_embedding()
    features = torch.randn(1, 1, 16, dtype=torch.float64)
    ids = torch.arange(VOCAB_SIZE)[None]
    scores = embedding(ids) @ features[0, 0]
    log_probabilities = embedding.logits(features)[0, 0]
    for first, end in ((0, 4), (4, 8), (8, VOCAB_SIZE)):
        difference = (scores[0, first:end] - log_probabilities[first:end]).detach()
        assert_close(difference, difference[0].expand_as(difference))


def test_bos_has_its_own_vector_and_all_vectors_start_with_norm_near_one():
    embedding = AdaptiveEmbedding(50_000, 64, cutoffs=(1_000, 10_000))
    vectors = embedding(torch.arange(50_001)[None])[0].detach()
    assert torch.equal(vectors[-1], embedding.bos)
    for first, end in ((0, 1_000), (1_000, 10_000), (10_000, 50_000)):
        assert vectors[first:end].square().sum(dim=-1).mean() == pytest.approx(1.0, rel=0.5)


def test_weights_that_are_padded_for_a_gpu_predict_nothing_else():
    embedding, features = TiedEmbedding(70, 8), torch.randn(2, 3, 8)
    logits = F.linear(features, *embedding._padded())
    assert logits.shape[-1] % 64 == 0
    assert torch.equal(logits[..., 70:], torch.full_like(logits[..., 70:], -torch.inf))  # [BOS] too
    assert_close(logits[..., :70], embedding.logits(features), relative=1e-5)


def test_rare_words_have_fewer_parameters():
    plain = Memformer(tiny_config(vocab_size=10_000, d_model=64))
    adaptive = Memformer(tiny_config(vocab_size=10_000, d_model=64, adaptive_cutoffs=(1_000, 4_000)))
    saved = plain.num_parameters - adaptive.num_parameters
    # 3,000 words of width 16, 6,000 words of width 4, two projections, and two entries of the first softmax.
    assert saved == 3_000 * (64 - 16) + 6_000 * (64 - 4) - 64 * (16 + 4) - 2 * 64


def test_gradient_reaches_every_cluster_that_occurs():
    embedding = adaptive_embedding()
    embedding.nll(torch.randn(1, 2, 16, dtype=torch.float64), torch.tensor([[0, 9]])).sum().backward()
    assert embedding.softmax.head.weight.grad.abs().sum() > 0
    assert embedding.softmax.tail[1][1].weight.grad.abs().sum() > 0
    assert embedding.softmax.tail[0][1].weight.grad is None


def test_padding_has_no_loss():
    model = tiny_model(adaptive_cutoffs=CUTOFFS)
    rollout = random_rollout(1, batch_size=3, padding=True)
    hidden, _ = model.encode(rollout.inputs[0], memory=model.initial_memory(3), padding_mask=rollout.input_padding[0])
    nll = model.token_nll(
        rollout.targets[0],
        hidden=hidden,
        hidden_padding_mask=rollout.input_padding[0],
        target_padding_mask=rollout.target_padding[0],
    )
    assert (nll == 0).equal(rollout.target_padding[0])
    logits = model.decode(rollout.targets[0], hidden=hidden, hidden_padding_mask=rollout.input_padding[0])
    expected = -logits.log_softmax(dim=-1).gather(-1, rollout.targets[0][..., None])[..., 0]
    assert_close(nll, expected.masked_fill(rollout.target_padding[0], 0))


def test_under_autocast_the_likelihood_is_float32():
    model = Memformer(tiny_config(adaptive_cutoffs=CUTOFFS))
    tokens = torch.randint(0, VOCAB_SIZE, (2, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = model.encode(tokens, memory=model.initial_memory(2))
        nll = model.token_nll(tokens, hidden=hidden)
    assert nll.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive_cutoffs": (4, 4)}, r"adaptive_cutoffs \(\[4, 4\]\) must be strictly ascending"),
        ({"adaptive_cutoffs": (8, 4)}, r"adaptive_cutoffs \(\[8, 4\]\) must be strictly ascending"),
        ({"adaptive_cutoffs": (0,)}, r"adaptive_cutoffs \(0\) must be at least 1"),
        ({"adaptive_cutoffs": (VOCAB_SIZE,)}, r"adaptive_cutoffs \(\[11\]\) must be below vocab_size \(11\)"),
        ({"adaptive_cutoffs": (2, 4, 6)}, r"d_model \(16\) must be at least 64"),
    ],
)
def test_wrong_cutoffs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Memformer(tiny_config(**changes))


@pytest.mark.parametrize("most_logits", [1, 5 * (VOCAB_SIZE + 1)], ids=["a token at a time", "five tokens at a time"])
def test_computing_logits_in_parts_does_not_change_results(most_logits, monkeypatch):
    model = tiny_model()
    rollout = random_rollout(3, batch_size=2, padding=True)
    whole = backpropagate(model, rollout)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for method in ("replay", "bptt", "checkpoint"):
        model.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(vocabulary, "_MOST_LOGITS", most_logits)
            assert_close(backpropagate(model, rollout, method=method).loss, whole.loss)
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name])


def test_logits_in_parts_are_not_held_for_the_backward_pass(monkeypatch):
    embedding = TiedEmbedding(1_000, 8)
    features = torch.randn(2, 64, 8, requires_grad=True)
    targets = torch.randint(0, 1_000, (2, 64))

    def largest_held():
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            embedding.nll(features, targets)
        return max(held)

    assert largest_held() == 2 * 64 * 1_000
    monkeypatch.setattr(vocabulary, "_MOST_LOGITS", 16 * 1_001)
    assert largest_held() <= features.numel()


def test_nll_and_gradients_equal_those_of_pytorch():
    embedding = adaptive_embedding()
    features = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    for targets in (torch.randint(0, VOCAB_SIZE, (2, 7)), torch.zeros(2, 7, dtype=torch.int64)):
        weights = [features, *embedding.softmax.parameters()]
        own = embedding.nll(features, targets)
        torchs = -embedding.softmax(features.flatten(0, 1), targets.flatten()).output.view_as(targets)
        assert_close(own, torchs)
        pairs = zip(
            *(torch.autograd.grad(each.sum(), weights, allow_unused=True) for each in (own, torchs)), strict=True
        )
        for of_own, of_torch in pairs:
            assert (of_own is None) == (of_torch is None)
            if of_own is not None:
                assert_close(of_own, of_torch)


def test_probabilities_of_a_model_in_half_precision_are_normalized_in_float32():
    embedding = AdaptiveEmbedding(1000, 64, cutoffs=(100, 400)).bfloat16()
    features = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    log_probabilities = embedding.logits(features)
    assert log_probabilities.dtype == torch.float32
    assert_close(log_probabilities.exp().sum(dim=-1), torch.ones(2, 3), relative=1e-5)
    targets = torch.randint(0, 1000, (2, 3))
    assert_close(
        embedding.nll(features, targets), -log_probabilities.gather(-1, targets[..., None])[..., 0], relative=1e-5
    )


def test_a_copy_of_a_compiled_embedding_computes_with_its_own_weights():
    embedding = TiedEmbedding(5, 4)
    embedding.compile(backend="eager")
    embedding(torch.tensor([1]))
    copied = copy.deepcopy(embedding)
    with torch.no_grad():
        copied.weight.zero_()
    assert copied(torch.tensor([1])).abs().sum() == 0
    assert pickle.dumps(embedding)
