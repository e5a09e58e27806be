"""Generation up to stop strings, with the harness's options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from memformer.data.tokenizers import Tokenizer
from memformer.errors import InputError, first_line
from memformer.generation.sampling import SamplingOptions, check_sampling
from memformer.generation.session import Session
from memformer.utils.checks import check_integer, shown

# The default of the harness's other models if a task gives no number.
_DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Generation:
    """Options of one generation.

    Attributes:
        until: Texts that end it; the result does not contain them.
        max_new_tokens: Maximum number of tokens.
        sampling: How tokens are drawn.
    """

    until: list[str]
    max_new_tokens: int
    sampling: SamplingOptions


def check_generation(options: Mapping[str, Any]) -> Generation:
    """Return the generation options of a request, after checking them.

    Without `do_sample`, and without a positive temperature, generation is greedy.

    Raises:
        InputError: An option is not supported or out of its range.
    """
    try:
        given = dict(normalize_gen_kwargs(dict(options), _DEFAULT_TOKENS))
    except (TypeError, ValueError) as error:
        raise InputError(f"the generation options {shown(dict(options))} are refused: {first_line(error)}") from error
    until, max_new_tokens, samples = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
    if not all(isinstance(text, str) for text in until):
        raise InputError(f"until ({until!r}) must be a text or a list of texts")
    temperature, top_k, top_p = given.pop("temperature", 1.0), given.pop("top_k", None), given.pop("top_p", None)
    if given.pop("num_beams", 1) != 1:
        raise InputError(f"num_beams ({options['num_beams']!r}) must be 1; the model memformer has no beam search")
    if given:
        raise InputError(
            f"generation option {sorted(given)[0]!r} is not supported by the model memformer, which reads until, "
            "max_gen_toks, do_sample, temperature, top_k and top_p"
        )
    return Generation(
        until=[text for text in until if text],
        max_new_tokens=check_integer("max_gen_toks", max_new_tokens, 0),
        # In transformers, 0 tokens means all.
        sampling=check_sampling(temperature=temperature if samples else 0, top_k=top_k or None, top_p=top_p),
    )


def generate(session: Session, tokenizer: Tokenizer, options: Generation) -> list[str]:
    """Return the text that each row of the session generates, without the stop string or what follows it.

    A row also ends with a stop token of the session. Sampling uses PyTorch's global generator, which the harness seeds.

    Raises:
        InputError: The model's weights are broken.
    """
    rows: list[list[int]] = [[] for _ in range(session.batch_size)]
    texts = [""] * len(rows)
    running = set(range(len(rows)))
    for step in session.stream(options.max_new_tokens, **options.sampling):
        for row in list(running):
            rows[row].append(step[row])
            texts[row] = tokenizer.decode(rows[row]).decode("utf-8", errors="replace")
            if step[row] in session.stop_token_ids or any(text in texts[row] for text in options.until):
                running.remove(row)
        if not running:
            break
    return [_before(text, options.until) for text in texts]


def _before(text: str, ends: list[str]) -> str:
    for end in ends:
        text = text.partition(end)[0]
    return text
