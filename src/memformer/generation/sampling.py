"""Choosing the next token from logits."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.errors import InputError


def check_sampling(*, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    """Check the sampling options before anything is computed.

    Raises:
        InputError: An option is out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature ({temperature}) must be at least 0 (0 is greedy) and finite")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k ({top_k}) must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p ({top_p}) must be above 0 and at most 1")


def sample(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
    generator: torch.Generator | None,
) -> Int64[Tensor, " B"]:
    """Return one token id for each row.

    Args:
        logits: Unnormalised log-probabilities.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keep only the k likeliest tokens; None keeps all.
        top_p: Keep the likeliest tokens that together reach this probability; None keeps all.
        generator: Where randomness comes from; None means torch's global generator.

    Raises:
        InputError: A logit is not finite.
    """
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are broken")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The likeliest token's logit is 0, so that no temperature, however low, makes it infinite.
    logits = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays while what comes before it has not reached top_p; so the likeliest one always stays.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)[:, 0]
