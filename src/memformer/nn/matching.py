"""Greedy matching of tokens to memory slots: a token whose best slot is taken gets another slot."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memformer.nn.linear import is_transformed

Preference = Float[Tensor, "*rows K S"]
Matching = Bool[Tensor, "*rows K S"]

# Ties between slots go to the earlier slot: each slot's preference is lowered by one more step than that of the slot
# before it. The step exceeds rounding errors, so that equal slots are taken in the same order in a batch and alone. (If
# preferences are so large that the step is lost, the first of the slots that remain equal is taken.) The sum of all
# steps is limited, so that it stays below real differences between slots, however many slots there are. (Up
# to 256 slots the step is 1e-3, the value of the measurements in experiments/RETENTION.md.)
_MAX_TIE_BREAK_STEP = 1e-3
_MAX_TIE_BREAK_SUM = 0.256


@torch.no_grad()
def match_slots(preference: Preference, *, least: float, sharing: bool = False) -> Matching:
    """Return True where a slot may take a token: at most one slot per token, and at most one token per slot.

    The matching is greedy: the pair with the highest preference is matched first, then the highest among the remaining
    slots and tokens, and so on. Each round matches all pairs that are each other's best, so there are at most as many
    rounds as pairs. (Several tokens share a slot only if its preferences for them are exactly equal.)

    Args:
        preference: Preference of each slot for each token; -inf for never.
        least: Pairs with this preference or a lower one are not matched.
        sharing: Give each token to the slot with the highest preference for it, even if that slot takes other tokens.
    """
    num_slots = preference.shape[-2]
    numbers = torch.arange(num_slots, device=preference.device)[:, None]
    tie_break_step = min(_MAX_TIE_BREAK_STEP, _MAX_TIE_BREAK_SUM / num_slots)
    remaining = (preference - tie_break_step * numbers.to(preference.dtype)).masked_fill(
        preference <= least, float("-inf")
    )
    if sharing:
        return (numbers == remaining.argmax(dim=-2, keepdim=True)) & (remaining > float("-inf"))
    matching = torch.zeros_like(remaining, dtype=torch.bool)
    # Every round but the last matches a pair. Only a CPU stops early: to know the last, a device would be waited for.
    stops_early = preference.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()
    for _ in range(min(preference.shape[-2:])):
        best_slot, best_token = remaining.argmax(dim=-2, keepdim=True), remaining.amax(dim=-1, keepdim=True)
        pairs = (numbers == best_slot) & (remaining == best_token) & (remaining > float("-inf"))
        if stops_early and not pairs.any():
            break
        matching |= pairs
        remaining = remaining.masked_fill(
            pairs.any(dim=-1, keepdim=True) | pairs.any(dim=-2, keepdim=True), float("-inf")
        )
    return matching
