"""Base classes of the models of transformers around the models of this library: one for each task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from memformer.errors import InputError, InputTypeError
from memformer.generation.session import Session
from memformer.hf.cache import MemformerCache, check_cache, check_cache_use
from memformer.hf.columns import (
    at_least_one,
    causal_loss,
    column_hidden_states,
    column_logits,
    columns_to_keep,
    stream_logits,
    with_all_ids,
)
from memformer.hf.configuration import RecurrentHFConfig, check_end_token, check_vocabulary
from memformer.hf.generating import StreamGenerationMixin, set_special_tokens
from memformer.hf.loading import check_all_are_loaded, check_is_on_one_device, saved_end_token
from memformer.hf.replaying import replayed_loss
from memformer.hf.rows import TokenRows, find_targets, find_tokens, make_rollout
from memformer.models import LanguageModel, build_model
from memformer.utils.checks import check_type
from memformer.utils.words import with_article


@dataclass
class MemformerModelOutput(ModelOutput):
    """Output of a model without a head.

    Attributes:
        last_hidden_state: (B, T, D), in each column the hidden state of its token; in a column of padding that of the
            last token before it.
    """

    last_hidden_state: Tensor | None = None


@dataclass
class MemformerCausalLMOutput(ModelOutput):
    """Output of a language model.

    Attributes:
        loss: Mean negative log-likelihood of the labels that count, in nats.
        logits: (B, T, V'), the logits of the token after each column; V' counts all ids, also those that are never
            predicted. None in training with labels: memory replay never holds all logits at once.
        cache: The state after the last token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MemformerCache | None = None


class RecurrentPreTrainedModel(PreTrainedModel):
    """Base class of all models: holds a model of this library as `memformer`.

    Args:
        config: The config.
    """

    config_class: ClassVar[type[RecurrentHFConfig]] = RecurrentHFConfig
    base_model_prefix = "memformer"
    _supports_sdpa = True
    memformer: LanguageModel

    def __init__(self, config: RecurrentHFConfig) -> None:
        if not isinstance(config, self.config_class):
            expected = with_article(self.config_class.__name__)
            raise InputTypeError(
                f"config is {with_article(type(config).__name__)}; {with_article(type(self).__name__)} has {expected}"
            )
        super().__init__(config)
        self.memformer = build_model(config.core())
        # A module that is called by other names than `forward` cannot be split over devices.
        self._no_split_modules = [type(self.memformer).__name__]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Return a saved model; see `PreTrainedModel.from_pretrained`.

        A folder that this library's own `save_pretrained` wrote is read too; if it has a tokenizer of this library that
        ends documents by a token, `generate` stops at it.

        Raises:
            CheckpointError: Weights of the model are missing, or (with `ignore_mismatched_sizes`) of another shape.
            InputError: A `device_map` divides the model among devices, or leaves weights on disk.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_all_are_loaded(model, info, start=f"{cls.base_model_prefix}.")
        check_is_on_one_device(getattr(model, "hf_device_map", {}))
        if model.can_generate():
            # transformers has replaced the generation config by the one in the folder, if any.
            set_special_tokens(model.generation_config, model.config)
            if model.generation_config.eos_token_id is None:
                model.generation_config.eos_token_id = saved_end_token(model.name_or_path, kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would save a copy of this library's code; the config saves what is needed."""

    @classmethod
    def from_core(cls, model: LanguageModel) -> Any:
        """Return a model of transformers around a model of this library; both have the same weights.

        Raises:
            InputError: The model is of another type than this class.
        """
        expected = cls.config_class.model_type
        if model.config.model_type != expected:
            raise InputError(
                f"model is {with_article(model.config.model_type)}; {with_article(cls.__name__)} holds "
                f"{with_article(expected)}"
            )
        with torch.device("meta"):
            wrapped = cls(cls.config_class(**model.config.to_dict()))
        wrapped.memformer = model
        wrapped.config.dtype = next(model.parameters()).dtype
        return wrapped.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of a module that a subclass has added: a model of this library draws its own."""
        if not any(module is own for own in self.memformer.modules()):
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; see `PreTrainedModel.save_pretrained`.

        Raises:
            InputError: The folder could not be loaded: `config.vocab_size` was changed after the model was made, or
                weights were added or removed, as by pruning (unless `state_dict` is given).
        """
        check_vocabulary(self.config, self.memformer.config)
        if kwargs.get("state_dict") is None:
            self.memformer.check_weights_are_of_config()
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds token ids."""
        return self.memformer.embedding

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> Any:
        """Refuse to change the vocabulary.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"the vocabulary of {with_article(self.config.model_type)} cannot be resized; build a new model instead"
        )

    def _find_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: object,
        *,
        num_past_columns: int = 0,
    ) -> TokenRows:
        if inputs_embeds is not None:
            raise InputError("inputs_embeds cannot be read: the model reads token ids; pass input_ids")
        if input_ids is None:
            raise InputError("input_ids are missing")
        check_type("input_ids", input_ids, Tensor)
        if attention_mask is not None:
            check_type("attention_mask", attention_mask, Tensor)
        check_vocabulary(self.config, self.memformer.config)
        check_end_token(self.config.eos_token_id, vocab_size=self.config.vocab_size)  # the Trainer may have changed it
        unread = frozenset({self.memformer.bos_token_id} | ({self.config.pad_token_id} - {None}))
        return find_tokens(
            self.memformer, input_ids, attention_mask, unread_ids=unread, num_past_columns=num_past_columns
        )

    def _as_output(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """Return the output, or, with `return_dict=False`, a tuple of what it holds."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class RecurrentHiddenModel(RecurrentPreTrainedModel):
    """Model without a head: returns hidden states."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **absent: object,
    ) -> MemformerModelOutput | tuple[Any, ...]:
        """Return the hidden states that the model reads its tokens into.

        Args:
            input_ids: (B, T), token ids. `[BOS]` may precede them; the model adds it by itself.
            attention_mask: (B, T), 0 at padding, which may stand anywhere. None: no padding but the pad token.
            inputs_embeds: Must be None.
            return_dict: False: return a tuple. None: what the config says.
            absent: `output_attentions`, `output_hidden_states`, `past_key_values` and `position_ids`, which other
                models have: None or False.

        Raises:
            InputError: A shape or a token id is wrong, or `inputs_embeds` or something absent is given.
        """
        _check_absent(absent, self.config)
        rows = self._find_tokens(input_ids, attention_mask, inputs_embeds)
        output = MemformerModelOutput(last_hidden_state=column_hidden_states(self.memformer, rows))
        return self._as_output(output, return_dict)


class RecurrentForCausalLM(RecurrentPreTrainedModel, StreamGenerationMixin):
    """Language model.

    In training with labels, gradients come from memory replay: they are those of full back-propagation through time,
    with the memory need of one segment. (None flow through the memory of a Transformer-XL or Compressive Transformer.)

    Args:
        config: The config.
    """

    accepts_loss_kwargs = True
    _is_stateful = True

    def __init__(self, config: RecurrentHFConfig) -> None:
        super().__init__(config)
        set_special_tokens(self.generation_config, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **absent: object,
    ) -> MemformerCausalLMOutput | tuple[Any, ...]:
        """Return logits, the loss, or the state after the last token.

        Args:
            input_ids: (B, T), token ids. `[BOS]` may precede them; the model adds it by itself. With a `cache`: the
                tokens after those that the cache has read.
            attention_mask: (B, T), 0 at padding, which may stand anywhere. With a `cache`, it may begin with the
                columns that the cache has read. None: no padding but the pad token.
            labels: (B, T), `input_ids` again, or -100 where the loss does not count. They are shifted inside.
            cache: A `MemformerCache`, the state to continue from; it is changed in place.
            use_cache: Return the state. None: if a `cache` is given, or the config says so. It must not be False with a
                `cache`. With a cache, dropout is off, and logits and loss have no gradient.
            logits_to_keep: Number of last columns to return logits of, or a tensor of columns. 0: all.
            num_items_in_batch: Number that the summed loss is divided by. None: the number of labels that count.
            inputs_embeds: Must be None.
            return_dict: False: return a tuple. None: what the config says.
            absent: `output_attentions`, `output_hidden_states`, `past_key_values` and `position_ids`, which other
                models have: None or False.

        Raises:
            InputError: A shape, a token id or a label is wrong, `num_items_in_batch` counts labels at padding, the
                cache is of another model or batch, or is used in training with gradients, or something absent is
                given.
        """
        _check_absent(absent, self.config)
        check_cache_use(cache, use_cache)
        num_past_columns = cache.get_seq_length() if isinstance(cache, MemformerCache) else 0
        rows = self._find_tokens(input_ids, attention_mask, inputs_embeds, num_past_columns=num_past_columns)
        assert input_ids is not None
        are_counted = num_items_in_batch is not None
        counted = None if labels is None else find_targets(rows, input_ids, labels, are_counted=are_counted)
        is_training = self.training and torch.is_grad_enabled()
        asked = columns_to_keep(logits_to_keep, input_ids.shape[1])
        by_default = bool(self.config.use_cache) and not is_training
        streams = cache is not None or (by_default if use_cache is None else use_cache)
        if is_training and streams:
            raise InputError("a cache carries no gradient; train without a cache, or call under torch.no_grad()")
        if counted is not None and is_training:
            output = MemformerCausalLMOutput(loss=self._train(rows, counted, num_items_in_batch))
        else:
            kept = asked if counted is None else slice(None)
            if streams:
                cache = self._open_cache(cache, batch_size=len(rows.counts))
                logits = stream_logits(cache.session, rows, kept)
                cache.advance(rows)
            else:
                logits = column_logits(self.memformer, rows, kept)
            loss = None if counted is None else causal_loss(logits, input_ids, counted, num_items=num_items_in_batch)
            if counted is not None:
                logits = logits[:, asked]
            logits = with_all_ids(logits, self.config.num_token_ids)
            output = MemformerCausalLMOutput(loss=loss, logits=logits, cache=cache)
        return self._as_output(output, return_dict)

    def _train(self, rows: TokenRows, counted: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Return the loss, whose gradient comes from memory replay.

        Raises:
            InputError: The model is a replica of `DataParallel`, which has no parameters.
        """
        if getattr(self, "_is_replica", False):
            raise InputError("torch.nn.DataParallel cannot train this model; use one process for each device")
        rollout = make_rollout(self.memformer, rows, num_after=0, is_target=counted)
        scale = 1.0 if num_items is None else rollout.count_target_tokens() / float(at_least_one(num_items))
        return replayed_loss(self.memformer, rollout, scale=scale, owner=self)

    def _open_cache(self, cache: Any, *, batch_size: int) -> MemformerCache:
        if cache is None:
            return MemformerCache(Session(self.memformer, batch_size=batch_size))
        check_cache(cache, session_model=self.memformer, batch_size=batch_size)
        return cache


_ABSENT = {
    "output_attentions": "attention weights are not returned; `memformer inspect` shows them",
    "output_hidden_states": "hidden states of layers are not returned; AutoModel returns those of the last one",
    "past_key_values": "the state is passed as cache",
    "position_ids": "positions are those of the tokens in their segment",
}


def _check_absent(absent: Mapping[str, object], config: RecurrentHFConfig) -> None:
    """Accept the arguments of other models, which the config can hold too, as long as they ask for nothing.

    Raises:
        InputError: One of them asks for something.
        InputTypeError: There is no such argument.
    """
    for name, value in absent.items():
        if name not in _ABSENT:
            raise InputTypeError(f"forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise InputError(f"{name} must be None or False: {_ABSENT[name]}")
    for name in ("output_attentions", "output_hidden_states"):
        if absent.get(name) is None and getattr(config, name, False):
            raise InputError(f"config.{name} must be False: {_ABSENT[name]}")
