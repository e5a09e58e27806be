import pytest
import torch

from memformer.nn.matching import match_slots

INFINITY = float("inf")


def test_tokens_that_lose_a_slot_take_the_next_one():
    # Both tokens want slot 0 most; the more eager one gets it.
    eagerness = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.0, 3.0]])
    assert match_slots(eagerness, least=-INFINITY).tolist() == [[True, False], [False, False], [False, True]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (6, 6)])
def test_a_matching_is_stable_and_as_large_as_can_be(shape):
    generator = torch.Generator().manual_seed(1)
    eagerness = torch.randn(2, 3, *shape, generator=generator)
    matching = match_slots(eagerness, least=-INFINITY)
    assert matching.sum(dim=-1).max() == matching.sum(dim=-2).max() == 1
    assert torch.equal(matching.sum(dim=(-2, -1)), torch.full((2, 3), min(shape)))
    # No slot and token would both rather have each other than what they have.
    has = eagerness.masked_fill(~matching, -INFINITY)
    slot_has, token_has = has.amax(dim=-1, keepdim=True), has.amax(dim=-2, keepdim=True)
    margin = 1e-3 * shape[0]  # the head start of earlier slots
    assert not ((eagerness > slot_has + margin) & (eagerness > token_has + margin)).any()


def test_slots_that_are_alike_are_taken_in_their_order_whatever_rounding_says():
    eagerness = torch.tensor([[5.0, 4.0, 9.0]]).expand(4, 3) + torch.rand(4, 3) * 1e-5
    matching = match_slots(eagerness, least=-INFINITY)
    assert matching.int().argmax(dim=-1)[:3].tolist() == [2, 0, 1]
    assert not matching[3].any()


def test_pairs_that_are_not_eager_enough_are_not_matched():
    eagerness = torch.tensor([[3.0, -2.0], [-INFINITY, -1.9]])
    assert match_slots(eagerness, least=-2.0).tolist() == [[True, False], [False, True]]
    assert not match_slots(eagerness - 5.0, least=-2.0).any()
    assert not match_slots(torch.full((2, 2), -INFINITY), least=-INFINITY).any()


def test_tokens_that_share_go_to_the_slot_that_wants_them_most():
    eagerness = torch.tensor([[5.0, 4.0, -3.0], [1.0, 2.0, -2.5], [0.0, 3.0, -2.5]])
    matching = match_slots(eagerness, least=-2.0, sharing=True)
    assert matching.tolist() == [[True, True, False], [False, False, False], [False, False, False]]
    assert match_slots(eagerness, least=-4.0, sharing=True)[:, 2].tolist() == [False, True, False]  # the earlier one


def test_rows_do_not_interfere():
    eagerness = torch.randn(4, 5, 6)
    together = match_slots(eagerness, least=0.0)
    assert torch.equal(together, torch.stack([match_slots(row, least=0.0) for row in eagerness]))


@pytest.mark.parametrize("num_slots", [32, 1024])
def test_the_head_start_of_earlier_slots_is_small_however_many_there_are(num_slots):
    eagerness = torch.zeros(num_slots, 1)
    eagerness[-1] = 0.3
    assert match_slots(eagerness, least=-INFINITY)[:, 0].tolist() == [False] * (num_slots - 1) + [True]
