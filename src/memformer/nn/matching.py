"""Which slot may take which token where slots compete: a matching, so that no token is lost to another one."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Eagerness = Float[Tensor, "*rows K S"]
Matching = Bool[Tensor, "*rows K S"]

# Between slots as eager as each other the first one wins. Above rounding, so that slots that are alike are taken in
# the same order in a batch and alone; and in all so little, however many slots there are, that it does not come before
# what tells other slots apart. (Up to 256 slots, what was measured: experiments/RETENTION.md.)
_LARGEST_HEAD_START = 1e-3
_LARGEST_HEAD_START_OF_ALL = 0.256


@torch.no_grad()
def match_slots(eagerness: Eagerness, *, least: float, sharing: bool = False) -> Matching:
    """Return True where a slot may take a token: a token is taken by one slot, and a slot takes one token.

    Greedy: the pair of the highest eagerness is matched, then the highest among the slots and tokens that are left, and
    so on. Found in rounds of all pairs that are each other's best: at most as many as there are pairs. (Only tokens
    that are exactly as eager for a slot as each other share it.)

    Args:
        eagerness: How much each slot wants each token; -inf for never.
        least: Pairs at or below it are not matched.
        sharing: Give each token to the slot that wants it most, whatever else that slot takes.
    """
    num_slots = eagerness.shape[-2]
    order = torch.arange(num_slots, device=eagerness.device, dtype=eagerness.dtype)
    head_start = min(_LARGEST_HEAD_START, _LARGEST_HEAD_START_OF_ALL / num_slots)
    left = (eagerness - head_start * order[:, None]).masked_fill(eagerness <= least, float("-inf"))
    if sharing:
        return (left == left.amax(dim=-2, keepdim=True)) & (left > float("-inf"))
    matching = torch.zeros_like(left, dtype=torch.bool)
    while True:
        best_slot, best_token = left.amax(dim=-2, keepdim=True), left.amax(dim=-1, keepdim=True)
        pairs = (left == best_slot) & (left == best_token) & (left > float("-inf"))
        if not pairs.any():
            return matching
        matching |= pairs
        left = left.masked_fill(pairs.any(dim=-1, keepdim=True) | pairs.any(dim=-2, keepdim=True), float("-inf"))
