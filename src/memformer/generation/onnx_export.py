"""Export to ONNX: one timestep and one decoding step as graphs for any number of rows.

A program reads a stream with them as a `Session` does, without PyTorch:

1. Begin: run the timestep on `[BOS]` and padding, with `reset` true, and empty caches.
2. Predict: run the decoding step on `[BOS]` at position 0 (the input `start`, if any, takes its place); it gives the
   logits of the segment's first token. Then run it on each token of the segment but the last, at positions 1, 2, ...
3. When the segment is full, run the timestep on it, empty the caches, and go on with 2.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memformer.errors import InputError
from memformer.models import LSTM, LanguageModel, Memformer
from memformer.models.decoder import Past
from memformer.models.recurrence import reading
from memformer.shapes import Memory, Segment, SegmentPadding
from memformer.utils.checks import check_type
from memformer.utils.files import new_folder, user_path

TIMESTEP_FILE = "timestep.onnx"
DECODING_STEP_FILE = "decoding_step.onnx"
SIZES_FILE = "sizes.json"

_PAST = ("past_keys", "past_values", "past_keep_mask", "start")
_CACHES = ("cached_keys", "cached_values")
_OF_LAYERS = {*_PAST[:2], *_CACHES}  # their first dimension is the layer, their second the row
# A file of protocol buffers holds at most 2 GB; weights of a larger model go into a file beside it.
_MOST_BYTES_IN_ONE_FILE = 1_500_000_000
# The smallest number of rows that is not treated as a constant while tracing.
_EXAMPLE_ROWS = 2


class Timestep(nn.Module):
    """One timestep of a model: reads a segment into the memory, and returns what the next tokens are predicted from.

    Args:
        model: The model.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, segment: Segment, padding_mask: SegmentPadding, memory: Memory, reset: Bool[Tensor, " B"]
    ) -> tuple[Tensor, ...]:
        """Return the next memory and, for a Memformer, the past of a decoding step, else the logits (B, S, V).

        Args:
            segment: Token ids.
            padding_mask: True at padding.
            memory: The current memory.
            reset: True in rows that begin a new stream; their memory is replaced by the initial memory.
        """
        model = self.model
        memory = model.reset_memory(memory, reset)
        hidden, next_memory = model.encode(segment, memory=memory, padding_mask=padding_mask)
        if not isinstance(model, Memformer):
            return next_memory, model.decode(torch.zeros_like(segment), hidden=hidden)
        past = model.precompute_past(hidden, hidden_padding_mask=padding_mask)
        assert past.keep_mask is not None
        keys, values = (torch.stack(list(each)) for each in zip(*past.keys_values, strict=True))
        found = next_memory, keys, values, past.keep_mask
        return found if past.start is None else (*found, past.start)


class DecodingStep(nn.Module):
    """One decoding step of a Memformer: a token of each row, predicted tokens and past in, logits out.

    Args:
        model: The model, with rotary positions.
    """

    def __init__(self, model: Memformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Int64[Tensor, "B 1"],
        positions: Int64[Tensor, "B 1"],
        past_keys: Float[Tensor, "layers B H S E"],
        past_values: Float[Tensor, "layers B H S E"],
        past_keep_mask: Bool[Tensor, "B 1 1 S"],
        cached_keys: Float[Tensor, "layers B H positions E"],
        cached_values: Float[Tensor, "layers B H positions E"],
        start: Float[Tensor, "B D"] | None = None,
    ) -> tuple[Float[Tensor, "B V"], Tensor, Tensor]:
        """Return the logits of the next token of each row, and the caches with the given tokens added.

        Args:
            tokens: The token before the one that is predicted; `[BOS]` at position 0.
            positions: Position of the predicted token in its segment; the segment length marks a row without a token.
            past_keys: Result of the timestep.
            past_values: Result of the timestep.
            past_keep_mask: Result of the timestep.
            cached_keys: Keys of the segment's tokens so far; zeros at the start of a segment.
            cached_values: Their values.
            start: Result of the timestep, for models with `decoder_start_tokens`: it replaces `[BOS]`.
        """
        model = self.model
        caches = model.make_caches(tokens.shape[0])
        for cache, keys, values in zip(caches, cached_keys, cached_values, strict=True):
            cache.keys, cache.values = keys.clone(), values.clone()
        past = Past(
            keys_values=list(zip(past_keys, past_values, strict=True)),
            positions=torch.arange(-past_keys.shape[3], 0),
            keep_mask=past_keep_mask,
            start=start,
        )
        logits = model.decode_step(tokens, past=past, caches=caches, positions=positions)
        keys, values = (torch.stack([getattr(cache, name) for cache in caches]) for name in ("keys", "values"))
        return logits[:, -1], keys, values


def example_inputs(model: LanguageModel) -> dict[str, dict[str, Tensor]]:
    """Return the inputs of the graphs at the start of streams, by graph and name."""
    rows, length = _EXAMPLE_ROWS, model.segment_length
    segment = torch.full((rows, length), model.bos_token_id)
    padding_mask = torch.ones(rows, length, dtype=torch.bool)
    padding_mask[:, 0] = False
    timestep = {
        "segment": segment,
        "padding_mask": padding_mask,
        "memory": model.initial_memory(rows).detach().clone(),
        "reset": torch.ones(rows, dtype=torch.bool),
    }
    if not isinstance(model, Memformer):
        return {TIMESTEP_FILE: timestep}
    past = dict(zip(_PAST, Timestep(model)(*timestep.values())[1:], strict=False))  # some models have no start
    caches = [torch.stack([getattr(cache, name) for cache in model.make_caches(rows)]) for name in ("keys", "values")]
    decoding_step = {
        "tokens": torch.full((rows, 1), model.bos_token_id),
        "positions": torch.zeros(rows, 1, dtype=torch.int64),
        **past,
        **dict(zip(_CACHES, caches, strict=True)),
    }
    return {TIMESTEP_FILE: timestep, DECODING_STEP_FILE: decoding_step}


def export_onnx(model: LanguageModel, folder: str | Path, *, progress: Callable[[str], object] | None = None) -> Path:
    """Write the timestep and, for a Memformer, the decoding step as ONNX graphs; return the folder.

    The folder also holds sizes.json: segment length, id of `[BOS]`, vocabulary, and the shapes of memory and caches for
    one row. It appears complete or not at all. The graphs compute in float32, whatever the model computes in.

    Args:
        model: A model on the CPU.
        folder: The folder; it must be new or empty.
        progress: Called with the name of each graph before it is exported, which takes seconds.

    Raises:
        InputError: The packages onnx and onnxscript are missing, the model's positions are relative, the model is an
            LSTM, or the folder is a file or contains files.
        InputTypeError: The model is not a language model, for example a classifier.
        SaveError: Writing failed; nothing is left behind.
    """
    check_type("model", model, LanguageModel)
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(f"exporting to ONNX needs {' and '.join(missing)}: pip install 'memformer-lm[onnx]'")
    if getattr(model.config, "positions", "rotary") != "rotary":
        # With relative positions, shapes depend on the distances that occur.
        raise InputError(f"positions ({model.config.positions!r}) must be 'rotary' to export a model to ONNX")
    if isinstance(model, LSTM):
        raise InputError("a model of type lstm cannot be exported to ONNX: it packs rows of unequal lengths")
    if next(model.parameters()).dtype != torch.float32:
        # In half precision the inputs would have different dtypes; ONNX Runtime lacks operations in float64.
        model = copy.deepcopy(model).float()
    with new_folder(folder) as partial, reading(model):
        examples = example_inputs(model)
        past = [name for name in examples.get(DECODING_STEP_FILE, {}) if name in _PAST]
        graphs: dict[str, tuple[nn.Module, list[str]]] = {
            TIMESTEP_FILE: (Timestep(model), ["next_memory", *(past or ["logits"])])
        }
        if isinstance(model, Memformer):
            graphs[DECODING_STEP_FILE] = DecodingStep(model), ["logits", *(f"next_{name}" for name in _CACHES)]
        for name, (graph, outputs) in graphs.items():
            if progress is not None:
                progress(name)
            _export(graph, examples[name], outputs, partial / name)
        (partial / SIZES_FILE).write_text(json.dumps(_sizes(model, examples), indent=2) + "\n", encoding="utf-8")
    return user_path(folder)


def _export(graph: nn.Module, inputs: dict[str, Tensor], outputs: list[str], file: Path) -> None:
    rows = torch.export.Dim("rows", min=1, max=2**20)
    size = sum(weight.nbytes for weight in graph.parameters())
    with _only_errors():
        torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            f=file,
            dynamo=True,
            external_data=size > _MOST_BYTES_IN_ONE_FILE,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={name: {1 if name in _OF_LAYERS else 0: rows} for name in inputs},
            verbose=False,
        )


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Hide warnings of PyTorch's exporter, which are about PyTorch's own code and packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sizes(model: LanguageModel, examples: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Return what a program needs to make the inputs; shapes are those of one row."""
    shapes = {}
    for name, tensor in [pair for inputs in examples.values() for pair in inputs.items()]:
        shapes[name] = list(tensor.shape)
        shapes[name][name in _OF_LAYERS] = 1
    return {
        "model_type": model.config.model_type,
        "segment_length": model.segment_length,
        "bos_token_id": model.bos_token_id,
        "vocab_size": model.vocab_size,
        "dtype": str(examples[TIMESTEP_FILE]["memory"].dtype).removeprefix("torch."),
        "shapes": shapes,
    }
