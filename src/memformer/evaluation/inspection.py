"""Inspection of the memory: what slots keep, what is written and read, and where the memory helped."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memformer.data import Tokenizer
from memformer.errors import InputError, InputTypeError
from memformer.evaluation.inspection_parts import Lifetimes, PassageList, Sampler, SlotHistory
from memformer.evaluation.inspection_results import InspectedTimestep, Inspection
from memformer.evaluation.streams import TokenTexts
from memformer.evaluation.token_surprisal import target_surprisal
from memformer.models.memformer import Memformer
from memformer.models.recurrence import reading, unwrapped
from memformer.models.recurrent_memory_transformer import RecurrentMemoryTransformer
from memformer.nn.attention import AttentionRecord
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, Integers, check_integer, check_integers, check_type
from memformer.utils.words import with_article

SlotModel = Memformer | RecurrentMemoryTransformer

# Weights kept in total: the page then has a few megabytes.
_KEPT_WEIGHTS = 2_000_000
_MOST_TIMESTEPS = 128


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """Options of `inspect_memory`.

    Args:
        max_timesteps: Largest number of timesteps of which everything is kept. They are evenly spaced: a longer stream
            is sampled with a distance that doubles as it grows. None: 2 million weights, at most 128 timesteps.
        window: First timestep of the stream to keep, and the timestep after the last one to keep; the timesteps between
            are all kept, and no others. None: sample the whole stream.
        num_passages: Number of passages.
        passage_tokens: Tokens of a passage.
        num_probes: Number of times at which the measuring of half-lives begins. 0: they are not measured.
        probe_timesteps: Largest number of timesteps during which a value is followed.
        max_probed_slots: Largest number of slots whose values are followed; if there are more, they are evenly spaced.

    Raises:
        InputError: A number is out of range, or both `max_timesteps` and `window` are given.
    """

    max_timesteps: Integer | None = None
    window: Integers | None = None
    num_passages: Integer = 10
    passage_tokens: Integer = 16
    num_probes: Integer = 4
    probe_timesteps: Integer = 32
    max_probed_slots: Integer = 64

    def __post_init__(self) -> None:
        least = {"num_passages": 0, "passage_tokens": 1, "num_probes": 0, "probe_timesteps": 1, "max_probed_slots": 1}
        for name, minimum in least.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), minimum))
        if self.max_timesteps is not None:
            object.__setattr__(self, "max_timesteps", check_integer("max_timesteps", self.max_timesteps, 1))
        if self.window is not None:
            if self.max_timesteps is not None:
                raise InputError("window and max_timesteps are both given; a window keeps all of its timesteps")
            window = check_integers("window", self.window, 0)
            if len(window) != 2 or window[0] >= window[1]:
                raise InputError(f"window ({window}) must be a first timestep and a larger timestep after the last one")
            object.__setattr__(self, "window", tuple(window))


def check_can_inspect(model: nn.Module) -> SlotModel:
    """Return the model, after checking that it has memory slots.

    Raises:
        InputError: The model is neither a Memformer nor a Recurrent Memory Transformer, or has no slots.
    """
    inner = unwrapped(model)
    if not isinstance(inner, Memformer | RecurrentMemoryTransformer):
        raise InputError(
            f"the model is {with_article(type(inner).__name__)}, whose memory has no slots that are read and written; "
            "only a Memformer and a RecurrentMemoryTransformer can be inspected"
        )
    if not inner.memory_shape[0]:
        raise InputError("num_slots is 0: the model has no memory to inspect; it needs at least 1 slot")
    return inner


def inspect_memory(
    model: nn.Module,
    stream: Iterable[Rollout],
    *,
    tokenizer: Tokenizer | None = None,
    options: InspectionOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Inspection:
    """Return what the memory did while a model read a stream of documents.

    Sums, slots and passages cover the whole stream; all weights and surprisals are kept for some timesteps only, so
    memory use does not grow with the stream. The model's mode is left unchanged.

    Args:
        model: The model: a Memformer with at least one slot, or a Recurrent Memory Transformer, whose memory tokens are
            the slots; it has no forgetting vectors, so half-lives are only measured.
        stream: Rollouts of one row: a `LaneStream` with one lane, a recall stream, or `read_stream` of token ids.
        tokenizer: Tokenizer for the texts of tokens. None: the results have no texts.
        options: What to keep and how to measure half-lives. None: the defaults.
        progress: Called after each rollout with the number of predicted tokens so far.

    Raises:
        InputError: The model has no memory slots, a rollout has several rows, the stream has no token or no document of
            more than one segment, or the model's likelihood is not finite.
        InputTypeError: `stream` does not hold rollouts, or `options` are of another class.
    """
    inner = check_can_inspect(model)
    if options is not None:
        check_type("options", options, InspectionOptions)
    if not isinstance(stream, Iterable):
        raise InputTypeError(
            f"stream is {with_article(type(stream).__name__)}; it must be rollouts, such as those of read_documents or "
            "read_stream (memformer.evaluation.streams)"
        )
    with reading(inner):
        inspector = _Inspector(inner, options or InspectionOptions(), TokenTexts(tokenizer))
        for rollout in stream:
            check_type("a rollout of the stream", rollout, Rollout)
            if rollout.batch_size != 1:
                raise InputError(f"a rollout has {rollout.batch_size} rows; the inspected stream must have 1")
            inspector.read(rollout)
            if progress is not None:
                progress(inspector.num_tokens)
        return inspector.result()


@dataclass(frozen=True)
class _Reading:
    """One timestep while it is read; weights are without padding, on the CPU in float64, and averaged over heads.

    `own_of_heads` is not averaged: each slot's weight for itself in each head, (H, K).
    """

    own_of_heads: NDArray[np.float64]
    kept: NDArray[np.float64]
    writer: NDArray[np.float64]
    readers: NDArray[np.float64]
    hidden: Tensor


class _Inspector:
    """Reads rollouts and collects the results.

    Args:
        model: The model.
        options: The options.
        texts: Texts of token ids.
    """

    def __init__(self, model: SlotModel, options: InspectionOptions, texts: TokenTexts) -> None:
        self._model = model
        self._texts = texts
        values: dict[str, Any] = dict(vars(options))  # integers, checked
        self._probe_timesteps, self._max_passages = values["probe_timesteps"], values["num_passages"]
        self._sampler = Sampler(values["window"], values["max_timesteps"] or _affordable_timesteps(model))
        self._history = SlotHistory(model.memory_shape[0], texts)
        self._passages = PassageList(values["num_passages"], values["passage_tokens"], texts)
        self._lifetimes = Lifetimes(
            model,
            num_probes=values["num_probes"],
            probe_timesteps=values["probe_timesteps"],
            max_slots=values["max_probed_slots"],
        )
        self._memory = model.initial_memory(1)
        self._num_timesteps = 0
        self._document = -1
        self._timestep = -1
        self._nll = np.zeros(2)
        self._previous_ids: list[int] = []
        self._previous_read_ids: list[int] = []
        self.num_tokens = 0

    def read(self, cpu_rollout: Rollout) -> None:
        """Read a rollout."""
        cpu_rollout = self._model.align_inputs(cpu_rollout)
        rollout = cpu_rollout.to(self._model.device)
        readings, places = [], []
        for index in range(rollout.num_timesteps):
            is_new = self._document < 0 or (cpu_rollout.reset is not None and bool(cpu_rollout.reset[index, 0]))
            self._document += is_new
            self._timestep = 0 if is_new else self._timestep + 1
            places.append((self._document, self._timestep))
            readings.append(self._read_segment(rollout, index, is_new=is_new))
        nll = target_surprisal(self._model, rollout, torch.cat([reading.hidden for reading in readings]))
        for index, (document, timestep) in enumerate(places):
            self._collect(cpu_rollout, index, document, timestep, readings[index], nll[:, index])

    def _read_segment(self, rollout: Rollout, index: int, *, is_new: bool) -> _Reading:
        if is_new:
            self._memory = self._model.initial_memory(1)
        padding = None if rollout.input_padding is None else rollout.input_padding[index]
        record = AttentionRecord()
        segment = rollout.inputs[index]
        hidden, memory = self._model.encode(segment, memory=self._memory, padding_mask=padding, attention=record)
        self._lifetimes.read(
            segment, padding, memory=self._memory, next_memory=memory, record=record, timestep=self._timestep
        )
        self._memory = memory
        tokens = slice(None) if padding is None else ~padding[0]
        assert record.writer is not None
        writer = record.writer[0].double().mean(dim=0)  # (K, 1 + S)
        return _Reading(
            own_of_heads=record.writer[0, :, :, 0].double().cpu().numpy(),
            kept=kept_share(record).cpu().numpy(),
            writer=torch.cat([writer[:, :1], writer[:, 1:][:, tokens]], dim=1).cpu().numpy(),
            readers=torch.stack([reader[0].double().mean(dim=0)[tokens] for reader in record.reader]).cpu().numpy(),
            hidden=hidden,
        )

    def _collect(
        self,
        rollout: Rollout,
        index: int,
        document: int,
        timestep: int,
        reading: _Reading,
        nll: NDArray[np.float64],
    ) -> None:
        """Add one timestep, with the surprisals (2, T), to the results."""
        read_ids = _ids(rollout.inputs, rollout.input_padding, index)
        target_ids = _ids(rollout.targets, rollout.target_padding, index)
        padding = rollout.target_padding
        nll = nll if padding is None else nll[:, ~padding[index, 0].numpy()]
        self._nll += nll.sum(axis=1)
        self.num_tokens += len(target_ids)
        # Not [BOS], and not a timestep of padding alone.
        reads_text = read_ids not in ([], [self._model.bos_token_id])
        if timestep == 0:
            self._history.begin_document()
            self._previous_ids = self._previous_read_ids = []
        if reads_text and (isinstance(self._model, Memformer) or rollout.targets_are_answers):
            # The segment before the targets; in a recall task the targets are not the next segment.
            self._previous_ids = read_ids
        self._passages.add(
            place=(self._num_timesteps, document, timestep),
            ids=target_ids,
            before=self._previous_ids,
            nll=nll,
            read=reading.readers.sum(axis=1).mean(axis=0) / max(1, len(read_ids)),
            last_write=self._history.last_write,
        )
        if reads_text:
            self._history.add(
                document,
                timestep,
                read_ids,
                before=self._previous_read_ids,
                kept=reading.kept,
                writer=reading.writer,
                own_of_heads=reading.own_of_heads,
            )
        if self._sampler.wants(self._num_timesteps):
            self._sampler.add(
                InspectedTimestep(
                    index=self._num_timesteps,
                    document=document,
                    timestep=timestep,
                    read_ids=read_ids,
                    target_ids=target_ids,
                    read_texts=self._texts.of(read_ids, before=self._previous_read_ids),
                    target_texts=self._texts.of(target_ids, before=self._previous_ids),
                    kept=reading.kept,
                    writer=reading.writer,
                    readers=reading.readers,
                    nll=nll[0],
                    nll_erased=nll[1],
                )
            )
        self._previous_ids, self._previous_read_ids = target_ids, read_ids
        self._num_timesteps += 1

    def result(self) -> Inspection:
        """Return the results.

        Raises:
            InputError: No token was read, or only `[BOS]`.
        """
        if not self._num_timesteps:
            raise InputError("the stream has no token; an inspection needs at least 1")
        if not self._history.num_timesteps:
            length = self._model.segment_length
            raise InputError(
                f"no document is longer than one segment ({length} tokens), so the memory is written from [BOS] alone; "
                f"an inspection needs a document of at least {length + 1} tokens"
            )
        return Inspection(
            num_documents=self._document + 1,
            num_timesteps=self._num_timesteps,
            num_tokens=self.num_tokens,
            segment_length=self._model.segment_length,
            nll=float(self._nll[0]),
            nll_erased=float(self._nll[1]),
            kind_shares=self._history.kind_shares(),
            kind_shares_of_heads=self._history.kind_shares_of_heads(),
            slots=self._history.slots(self._model, self._lifetimes),
            timesteps=self._sampler.timesteps,
            selection=self._sampler.describe(self._num_timesteps),
            passages=self._passages.best(),
            max_passages=self._max_passages,
            num_probes=self._lifetimes.num_started,
            probe_timesteps=self._probe_timesteps,
            num_probed_slots=len(self._lifetimes.slots),
            image_width=self._texts.image_width,
        )


def kept_share(record: AttentionRecord) -> Tensor:
    """Return the share of itself that each slot of the first row keeps, (K,); see `InspectedTimestep.kept`."""
    assert record.writer is not None
    own = record.writer[0, :, :, 0].double().mean(dim=0)
    return own if record.left is None else own * record.left[0].double()


def _affordable_timesteps(model: SlotModel) -> int:
    num_layers = len(model.encoder.layers if isinstance(model, Memformer) else model.layers)
    per_timestep = model.memory_shape[0] * (1 + model.segment_length) * (1 + num_layers)
    return min(_MOST_TIMESTEPS, max(4, _KEPT_WEIGHTS // per_timestep))


def _ids(tokens: Tensor, padding: Tensor | None, index: int) -> list[int]:
    """Return the token ids of one timestep without padding."""
    ids: list[int] = (tokens[index, 0] if padding is None else tokens[index, 0, ~padding[index, 0]]).tolist()
    return ids
