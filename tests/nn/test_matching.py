import pytest
import torch

from memformer.nn.matching import match_slots

INFINITY = float("inf")


def test_a_token_whose_best_slot_is_taken_gets_the_next_one():
    # Slot 0 has the highest preference for both tokens; the token with the higher one gets it.
    preference = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.0, 3.0]])
    assert match_slots(preference, least=-INFINITY).tolist() == [[True, False], [False, False], [False, True]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (6, 6)])
def test_a_matching_is_stable_and_as_large_as_possible(shape):
    generator = torch.Generator().manual_seed(1)
    preference = torch.randn(2, 3, *shape, generator=generator)
    matching = match_slots(preference, least=-INFINITY)
    assert matching.sum(dim=-1).max() == matching.sum(dim=-2).max() == 1
    assert torch.equal(matching.sum(dim=(-2, -1)), torch.full((2, 3), min(shape)))
    # There is no pair of slot and token that both prefer to their own match.
    has = preference.masked_fill(~matching, -INFINITY)
    slot_has, token_has = has.amax(dim=-1, keepdim=True), has.amax(dim=-2, keepdim=True)
    margin = 1e-3 * shape[0]  # the tie-breaking advantage of earlier slots
    assert not ((preference > slot_has + margin) & (preference > token_has + margin)).any()


def test_equal_slots_are_taken_in_order_despite_rounding():
    preference = torch.tensor([[5.0, 4.0, 9.0]]).expand(4, 3) + torch.rand(4, 3) * 1e-5
    matching = match_slots(preference, least=-INFINITY)
    assert matching.int().argmax(dim=-1)[:3].tolist() == [2, 0, 1]
    assert not matching[3].any()


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("height", [0.0, 5_000.0, 20_000.0, 1e9])
def test_a_token_is_taken_by_one_of_equal_slots_however_large_their_preference(height, sharing):
    """Float32 cannot tell 20,000 from 20,000 less a step."""
    matching = match_slots(torch.full((1024, 2), height), least=-INFINITY, sharing=sharing)
    assert matching.sum(dim=0).tolist() == [1, 1]


def test_pairs_at_or_below_the_least_preference_are_not_matched():
    preference = torch.tensor([[3.0, -2.0], [-INFINITY, -1.9]])
    assert match_slots(preference, least=-2.0).tolist() == [[True, False], [False, True]]
    assert not match_slots(preference - 5.0, least=-2.0).any()
    assert not match_slots(torch.full((2, 2), -INFINITY), least=-INFINITY).any()


def test_with_sharing_tokens_go_to_the_slot_with_the_highest_preference():
    preference = torch.tensor([[5.0, 4.0, -3.0], [1.0, 2.0, -2.5], [0.0, 3.0, -2.5]])
    matching = match_slots(preference, least=-2.0, sharing=True)
    assert matching.tolist() == [[True, True, False], [False, False, False], [False, False, False]]
    assert match_slots(preference, least=-4.0, sharing=True)[:, 2].tolist() == [False, True, False]  # the earlier one


def test_rows_do_not_interfere():
    preference = torch.randn(4, 5, 6)
    together = match_slots(preference, least=0.0)
    assert torch.equal(together, torch.stack([match_slots(row, least=0.0) for row in preference]))


@pytest.mark.parametrize("num_slots", [32, 1024])
def test_tie_breaking_is_small_for_any_number_of_slots(num_slots):
    preference = torch.zeros(num_slots, 1)
    preference[-1] = 0.3
    assert match_slots(preference, least=-INFINITY)[:, 0].tolist() == [False] * (num_slots - 1) + [True]
