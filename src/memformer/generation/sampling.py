"""Sampling of the next token from logits."""

from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from memformer.errors import InputError
from memformer.utils.checks import Integer, Number, check_integer, check_number


class SamplingOptions(TypedDict):
    """Keyword arguments of `sample`, as plain numbers."""

    temperature: float
    top_k: int | None
    top_p: float | None


def check_sampling(*, temperature: Number, top_k: Integer | None, top_p: Number | None) -> SamplingOptions:
    """Return the sampling options as plain numbers, after checking them.

    Raises:
        InputError: An option is out of its range.
        InputTypeError: An option has the wrong type.
    """
    return {
        "temperature": float(check_number("temperature", temperature, minimum=0)),
        "top_k": None if top_k is None else check_integer("top_k", top_k, 1),
        "top_p": None if top_p is None else float(check_number("top_p", top_p, above=0, maximum=1)),
    }


def sample(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    allowed: Bool[Tensor, "B V"] | None = None,
) -> Int64[Tensor, " B"]:
    """Return one sampled token id for each row, on the CPU.

    Args:
        logits: Unnormalized log-probabilities.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens. None: keep all.
        top_p: Keep the most likely tokens whose total probability reaches this value. None: keep all.
        generator: Source of randomness. None: PyTorch's global generator.
        allowed: True at the tokens that may be drawn, at least one in each row. None: all.

    Raises:
        InputError: A logit is not finite.
    """
    # The device is waited for once, at the end. Drawing needs finite logits, on CUDA most of all.
    is_finite = logits.isfinite().all(dim=-1)
    logits = torch.where(is_finite[:, None], logits, 0.0)
    drawn = _draw(
        logits if allowed is None else logits.masked_fill(~allowed, float("-inf")),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    drawn = torch.where(is_finite, drawn, -1).cpu()
    if (drawn < 0).any():
        raise InputError("the model's logits are not finite: its weights or its memory are broken")
    return drawn


def _draw(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
    generator: torch.Generator | None,
) -> Int64[Tensor, " B"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The logit of the most likely token is 0, so that even the lowest temperature does not make it infinite.
    logits = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    limits = torch.finfo(logits.dtype)
    logits = logits / min(max(temperature, limits.tiny), limits.max)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is kept if the tokens before it have not reached top_p.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        beyond[:, 0] = False  # The most likely token is kept even if top_p is rounded to 0 in this dtype.
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)[:, 0]
