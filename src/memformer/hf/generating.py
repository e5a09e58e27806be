"""Hooks of transformers' `generate` for models that carry a memory instead of a list of keys."""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.hf.cache import MemformerCache, check_cache_use
from memformer.hf.configuration import check_end_token
from memformer.utils.words import with_article


def set_special_tokens(generation_config: Any, config: Any) -> None:
    """Set the tokens for begin, end and padding that a generation config lacks."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(config, name))


def _num_repeats(generation_config: Any) -> int:
    """Return into how many rows a row of the prompt is repeated, for beams or for several results."""
    return max(generation_config.num_beams, generation_config.num_return_sequences)


class StreamGenerationMixin(GenerationMixin):
    """`generate` with a `MemformerCache`."""

    config: Any
    memformer: Any
    _find_tokens: Any

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make the cache that `generate` begins with, for all beams; the rows of a given one are repeated later.

        Raises:
            InputError: A `cache_implementation` is given, or a cache although none shall be used.
        """
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation ({generation_config.cache_implementation!r}) must not be given: the state of "
                f"{with_article(self.config.model_type)} has a fixed size and only one form"
            )
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        repeats = _num_repeats(generation_config)
        cache = model_kwargs.get("cache")
        check_cache_use(cache, generation_config.use_cache)
        if cache is None and generation_config.use_cache is not False:
            session = Session(self.memformer, batch_size=batch_size * repeats)
            model_kwargs["cache"] = MemformerCache(session)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers looks at its parameters
    def prepare_inputs_for_generation(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of `forward`, which reads no tokenizer: `generate` is given one for `stop_strings`."""
        del tokenizer
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """Read the prompt, or what follows in it after the tokens that the cache has read.

        As for other models, a mask with more columns than the prompt says that the prompt holds new columns only.
        Either way, `forward` gets a mask that begins with the columns that the cache has read. The rows of a cache are
        repeated for beams and several results only here, once the prompt is checked: a refused call leaves the caller's
        cache as it was.

        Raises:
            InputError: A token or the mask is wrong, or the prompt is not known to be new, and does not begin with the
                tokens that the cache has read.
        """
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        num_columns = input_ids.shape[1]
        width = getattr(generation_config, "_mask_length", num_columns) if mask is None else mask.shape[1]
        if isinstance(cache, MemformerCache):
            num_past = cache.get_seq_length()
            holds_all = num_past > 0 and width == num_columns
            repeats = _num_repeats(generation_config)
            if cache.batch_size * repeats != input_ids.shape[0]:
                repeats = 1  # the cache has all rows
            rows = self._find_tokens(
                input_ids[::repeats],
                None if mask is None else mask[::repeats],
                model_kwargs.get("inputs_embeds"),
                num_past_columns=0 if holds_all else num_past,
            )
            if holds_all:
                cache.check_begin(rows)
                # The first column with a new token is the first to read; tokens that were read before are masked.
                num_read = torch.tensor(cache.num_read, device=rows.ranks.device)
                is_new = (rows.is_token & (rows.ranks > num_read[:, None])).repeat_interleave(repeats, dim=0)
                mask = is_new.to(input_ids.device, torch.int64)
                first = int(mask.amax(dim=0).argmax())  # 0 if no token is new: all columns are masked then
                input_ids, mask = input_ids[:, first:], mask[:, first:]
                model_kwargs["attention_mask"] = torch.cat([mask.new_ones((mask.shape[0], num_past)), mask], dim=1)
            if repeats > 1:
                cache.batch_repeat_interleave(repeats)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _prepare_special_tokens(
        self,
        generation_config: Any,
        kwargs_has_attention_mask: bool | None = None,
        device: Any = None,
        batch_size: int | None = None,
    ) -> None:
        """Use the config's tokens where none are given; check that rows which have stopped read no padding.

        Raises:
            InputError: Padding is a token of the vocabulary, or an end token cannot be predicted.
        """
        set_special_tokens(generation_config, self.config)
        check_end_token(generation_config.eos_token_id, vocab_size=self.config.vocab_size)
        super()._prepare_special_tokens(generation_config, kwargs_has_attention_mask, device, batch_size)
        num_rows = (batch_size or 1) * generation_config.num_return_sequences
        padding = generation_config._pad_token_tensor
        may_stop_alone = generation_config._eos_token_tensor is not None and num_rows > 1
        if may_stop_alone and generation_config.num_beams == 1 and int(padding) < self.config.vocab_size:
            reason = "is a token of the vocabulary, which rows that have stopped would read"
            raise InputError(
                f"pad_token_id ({int(padding)}) {reason if padding >= 0 else 'is negative'}; it must be "
                f"{self.config.vocab_size} (generation_config.pad_token_id)"
            )

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scores of the generated tokens; see `GenerationMixin.compute_transition_scores`."""
        # The method takes the number of columns of the scores from the config, whose vocab_size counts tokens only.
        config = copy.copy(self.config)
        config.vocab_size = self.config.num_token_ids
        scores: Tensor = GenerationMixin.compute_transition_scores(SimpleNamespace(config=config), *args, **kwargs)
        return scores
