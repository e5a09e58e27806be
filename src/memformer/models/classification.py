"""The Memformer with a classification head: labels of documents of any length, or of their segments."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer.errors import InputError, InputTypeError
from memformer.models.classification_config import MemformerClassificationConfig
from memformer.models.classification_rollout import label_rollout
from memformer.models.encoder import Encoder
from memformer.models.memformer import Memformer
from memformer.models.memory_encoder import MemoryEncoder, last_of
from memformer.models.recurrence import check_tokens, reading
from memformer.nn.attention import AttentionRecord
from memformer.nn.auxiliary import AuxiliaryLoss
from memformer.nn.linear import is_transformed
from memformer.rollout import Rollout, check_targets_have_inputs
from memformer.shapes import Hidden, Logits, Memory, Segment, SegmentPadding, Targets
from memformer.utils.checks import check_type
from memformer.utils.token_ids import TokenRow, check_token_ids

# Tokens read before the log-probabilities of their segments are put together.
_CHUNK_SEGMENTS = 1024
# Not typing.Self: the run-time type checker of the tests does not support it in class methods.
Classifier = TypeVar("Classifier", bound="MemformerForSequenceClassification")


class MemformerForSequenceClassification(MemoryEncoder):
    """The Memformer's encoder and memory with a classification head instead of a decoder.

    It reads a document segment by segment. After each segment the head gives the log-probabilities of the labels from
    one pooled state, so they depend on all that was read. Training is that of any model here: in a `Rollout` for
    `backpropagate`, `targets` are labels, (N, B, 1), and `target_padding` is True where a timestep has no label;
    `make_rollout` makes one. The loss is the mean negative log-likelihood per label, in nats.

    Args:
        config: The model's config.
    """

    config: MemformerClassificationConfig
    config_class: ClassVar[type[MemformerClassificationConfig]] = MemformerClassificationConfig

    _other_calls = "classify(token_ids) or log_probabilities(token_ids) to label a document"

    def __init__(self, config: MemformerClassificationConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self._make_memory()
        self.head_norm = nn.LayerNorm(config.pooled_width)
        self.head_dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.pooled_width, config.num_labels)
        self._initialise()

    @classmethod
    def from_memformer(cls: type[Classifier], model: Memformer, **fields: Any) -> Classifier:
        """Return a classifier with a copy of a Memformer's encoder and memory, and a new head; it is in training mode.

        Args:
            model: The Memformer, for example one trained as a language model.
            fields: Fields of the classifier's config that differ from those of the Memformer, as `num_labels`.

        Raises:
            InputError: A field is unknown or out of range, or changes the shape of a weight.
            InputTypeError: The model is not a `Memformer`.
        """
        check_type("model", model, Memformer)
        valid = {field.name for field in dataclasses.fields(cls.config_class)}
        shared = {name: value for name, value in model.config.to_dict().items() if name in valid}
        like = next(model.parameters())
        classifier = cls(cls.config_class.from_dict({**shared, **fields})).to(like.device, like.dtype)
        weights = {name: each for name, each in model.state_dict().items() if not name.startswith("decoder.")}
        own = {name: each for name, each in classifier.state_dict().items() if not name.startswith("head")}
        wrong = [name for name in {**weights, **own} if _shape(weights, name) != _shape(own, name)]
        if wrong:
            raise InputError(
                f"the fields ({', '.join(fields)}) give another encoder than the Memformer's: {wrong[0]} has shape "
                f"{_shape(own, wrong[0])}, not {_shape(weights, wrong[0])}"
            )
        classifier.load_state_dict(weights, strict=False)
        return classifier

    @classmethod
    def _count_layers(cls, config: MemformerClassificationConfig) -> Mapping[str, int]:
        return {"encoder.layers": config.num_encoder_layers}

    @property
    def num_labels(self) -> int:
        """Number of labels L."""
        return self.config.num_labels

    def encode(
        self,
        segment: Segment,
        *,
        memory: Memory | None = None,
        padding_mask: SegmentPadding | None = None,
        attention: AttentionRecord | None = None,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> tuple[Hidden, Memory]:
        """Read one segment; return the state that the head reads, (B, 1, D), and the next memory.

        With `pooling: memory` the state has the width W of the slots.

        The memory of a row that is all padding does not change; its state is finite but meaningless.

        Args:
            segment: Token ids, 0 .. V (V is `[BOS]`, and special tokens follow it).
            memory: The current memory. None: the initial memory.
            padding_mask: True at padding, which may come before or after the tokens, not between. None: no padding.
            attention: Receives the attention weights of memory readers and writer, if given.
            auxiliary: Receives the write penalty (see `MemoryWriter`), if given.

        Raises:
            InputError: A token id or a shape is out of range, the memory is of another model, or `auxiliary` is
                given and the model has no slots or writes every token (`write_normalizer: softmax`).
            InputTypeError: A dtype is wrong.
        """
        hidden, _, next_memory = self._read(segment, memory, padding_mask, attention, auxiliary)
        if self.config.pooling == "memory":
            pooled = next_memory.mean(dim=1, keepdim=True).to(hidden.dtype)
        elif self.config.pooling == "last":
            pooled = last_of(hidden, padding_mask)
        else:
            pooled = _mean_of(hidden, padding_mask)
        return pooled, next_memory

    def decode(self, targets: Targets, *, hidden: Hidden, hidden_padding_mask: SegmentPadding | None = None) -> Logits:
        """Return the logits of the labels, (B, 1, L).

        Args:
            targets: Labels, (B, 1), which are checked but have no effect: a label depends on no other label.
            hidden: States from `encode`.
            hidden_padding_mask: Has no effect: `encode` leaves padding out.

        Raises:
            InputError: A label or a shape is out of range.
            InputTypeError: A dtype is wrong.
        """
        self._check_labels(targets)
        check_type("hidden", hidden, Tensor)
        expected = (targets.shape[0], 1, self.config.pooled_width)
        if hidden.shape != expected:
            raise InputError(f"hidden has shape {tuple(hidden.shape)}; it must be {expected}")
        del hidden_padding_mask
        return self._logits(hidden)

    def _logits(self, hidden: Hidden) -> Logits:
        logits: Tensor = self.head(self.head_dropout(self.head_norm(hidden)))
        return logits

    def _check_labels(self, labels: Tensor) -> None:
        check_type("labels (targets)", labels, Tensor)
        if labels.dtype != torch.int64:
            raise InputTypeError(f"labels have dtype {labels.dtype}; they must be torch.int64")
        if labels.shape[-1:] != (1,):
            raise InputError(f"labels (targets) have shape {tuple(labels.shape)}; the last dimension must be 1")
        # Values are not checked where that would synchronize the device, or where tensors stand for something else.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
            wrong = labels[(labels < 0) | (labels >= self.num_labels)]
            if wrong.numel():
                raise InputError(f"label {int(wrong[0])} is out of range; valid labels are 0 to {self.num_labels - 1}")

    def align_inputs(self, rollout: Rollout) -> Rollout:
        """Return the rollout itself, after checking its tokens and labels.

        Raises:
            InputError: A token id or a label is out of range, there is not one label for each timestep and row, or a
                timestep without a token has a label (checked on a CPU only).
        """
        check_tokens(rollout.inputs.flatten(0, 1), largest=self._largest_token_id, name="inputs")
        self._check_labels(rollout.targets)
        check_targets_have_inputs(rollout, target="a label")
        return rollout

    def make_rollout(self, documents: Sequence[TokenRow], labels: Sequence[Any]) -> Rollout:
        """Return a rollout with one document a row, on the model's device; shorter documents are padded at the end.

        Args:
            documents: Token ids of each document, 0 .. V-1; documents may differ in length.
            labels: Label of each document or, with `label_unit: segment`, the labels of each document's segments, of
                which the last may have fewer than `segment_length` tokens.

        Raises:
            InputError: A document is empty, a token id or a label is out of range, or the numbers of documents,
                segments and labels disagree.
            InputTypeError: Token ids or labels are not integers.
        """
        rollout = label_rollout(documents, labels, config=self.config)
        return self.align_inputs(rollout).to(self.device)

    def rollout_log_probabilities(
        self, rollout: Rollout, *, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "N B L"], Memory]:
        """Return the log-probabilities of the labels after every timestep, without gradient, and the final memory.

        They are meaningless at timesteps without tokens.

        Args:
            rollout: The documents; its labels are not read.
            memory: The memory at the start. None: the initial memory.

        Raises:
            InputError: A token id is out of range, or the memory is of another model.
            InputTypeError: A dtype is wrong.
        """
        check_type("rollout", rollout, Rollout)
        memory = self._enter(memory, batch_size=rollout.batch_size)
        found = []
        with reading(self):
            for timestep in range(rollout.num_timesteps):
                if rollout.reset is not None:
                    memory = self.reset_memory(memory, rollout.reset[timestep])
                padding = None if rollout.input_padding is None else rollout.input_padding[timestep]
                hidden, memory = self.encode(rollout.inputs[timestep], memory=memory, padding_mask=padding)
                found.append(self._log_probabilities(hidden))
        return torch.stack(found), memory.detach()

    def _log_probabilities(self, hidden: Hidden) -> Float[Tensor, "B L"]:
        logits = self._logits(hidden)[:, 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    def stream(self) -> "ClassificationStream":
        """Return a stream that reads one document piece by piece; its state does not grow with the tokens read."""
        return ClassificationStream(self)

    def log_probabilities(self, token_ids: TokenRow) -> Float[Tensor, "*segments L"]:
        """Return the log-probabilities of a document's labels, (L), or with `label_unit: segment` (segments, L).

        Memory for activations and state does not grow with the document's length.

        Args:
            token_ids: Token ids of one document, 0 .. V-1.

        Raises:
            InputError: There is no token, or a token id is out of range.
            InputTypeError: The token ids are not integers.
        """
        ids = check_token_ids(token_ids, vocab_size=self.vocab_size)
        stream, found = self.stream(), []
        step = _CHUNK_SEGMENTS * self.segment_length
        for start in range(0, len(ids), step):
            segments = stream.feed(ids[start : start + step])
            if self.config.label_unit == "segment":
                found.append(segments)
        last = stream.log_probabilities()
        if self.config.label_unit == "document":
            return last
        if len(ids) % self.segment_length:
            found.append(last[None])
        return torch.cat(found)

    def classify(self, token_ids: TokenRow) -> int | list[int]:
        """Return the most probable label of a document, or with `label_unit: segment` of each of its segments.

        Args:
            token_ids: As for `log_probabilities`.

        Raises:
            InputError: As `log_probabilities`, or a probability is not finite.
            InputTypeError: As `log_probabilities`.
        """
        found = self.log_probabilities(token_ids)
        if not found.isfinite().all():
            raise InputError("the labels' probabilities are not finite: the model's weights are broken")
        labels: int | list[int] = found.argmax(dim=-1).tolist()
        return labels


class _StreamState(NamedTuple):
    """State of a stream: `pending` holds the tokens of the unfinished segment, `last` the latest result."""

    num_tokens: int
    memory: Tensor
    pending: Tensor
    last: Tensor | None


class ClassificationStream:
    """Reads one document in pieces of any length and gives the log-probabilities of its labels at any point.

    The result depends on the tokens alone, not on how they are split. The state is one memory and the tokens of at most
    one segment.

    Args:
        model: The classifier.
    """

    def __init__(self, model: MemformerForSequenceClassification) -> None:
        self._model = model
        with reading(model):
            memory = model.initial_memory(1).clone()
        self._state = _StreamState(0, memory, torch.zeros((1, 0), dtype=torch.int64, device="cpu"), None)

    def _memory(self, state: "_StreamState") -> Memory:
        """Return the memory of a state, where the model is now and in its dtype."""
        return state.memory.to(self._model.device, self._model.memory_dtype)

    @property
    def num_tokens(self) -> int:
        """Number of tokens read, also if an exception has ended `feed` early."""
        return self._state.num_tokens

    def feed(self, token_ids: TokenRow) -> Float[Tensor, "M L"]:
        """Read tokens; return the log-probabilities of the labels after each segment that they complete.

        Raises:
            InputError: A token id is out of range; nothing is read.
            InputTypeError: The token ids are not integers; nothing is read.
        """
        model = self._model
        ids = torch.from_numpy(check_token_ids(token_ids, vocab_size=model.vocab_size).astype(np.int64))[None]
        found = []
        with reading(model):
            # A part fills the segment that was begun, or is a segment of its own.
            while (state := self._state).pending.shape[1] + ids.shape[1] >= model.segment_length:
                missing = model.segment_length - state.pending.shape[1]
                segment, ids = torch.cat([state.pending, ids[:, :missing]], dim=1), ids[:, missing:]
                hidden, memory = model.encode(segment.to(model.device), memory=self._memory(state))
                found.append(model._log_probabilities(hidden)[0])
                # In one step, so that an interrupt finds a whole state.
                self._state = _StreamState(state.num_tokens + missing, memory, segment[:, :0].clone(), found[-1])
            # A new tensor, not a view, which would keep all tokens.
            pending = torch.cat([state.pending, ids], dim=1).clone()
            self._state = state._replace(num_tokens=state.num_tokens + ids.shape[1], pending=pending)
        if not found:
            return torch.zeros((0, model.num_labels), dtype=model.memory_dtype, device=model.device)
        return torch.stack(found)

    def log_probabilities(self) -> Float[Tensor, " L"]:
        """Return the log-probabilities of the labels after all tokens read so far; the state does not change.

        Raises:
            InputError: No token has been read.
        """
        state = self._state
        if not state.pending.shape[1]:
            if state.last is None:
                raise InputError("no token has been read; a label needs at least one")
            return state.last.clone()
        with reading(self._model):
            hidden, _ = self._model.encode(state.pending.to(self._model.device), memory=self._memory(state))
            return self._model._log_probabilities(hidden)[0]

    @property
    def state_bytes(self) -> int:
        """Size of the state in bytes."""
        memory, pending = self._state.memory, self._state.pending
        last = self._model.num_labels * memory.element_size()
        return memory.nbytes + self._model.segment_length * pending.element_size() + last


def _mean_of(hidden: Float[Tensor, "B S D"], padding_mask: SegmentPadding | None) -> Float[Tensor, "B 1 D"]:
    if padding_mask is None:
        return hidden.mean(dim=1, keepdim=True)
    counts = (~padding_mask).sum(dim=1)[:, None, None]
    return hidden.masked_fill(padding_mask[..., None], 0.0).sum(dim=1, keepdim=True) / counts.clamp(min=1)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None
