"""How a small difference in the memory grows or fades while a model reads on."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from memformer.data import Corpus, LaneStream
from memformer.evaluation.likelihood import check_vocabulary
from memformer.models.memory_encoder import MemoryEncoder
from memformer.models.recurrence import reading, unwrapped

# The difference relative to the memory: in float32 far above rounding errors, and small enough to act linearly.
_RELATIVE_CHANGE = 1e-3
# Segments after the beginning of a document until the difference has turned into the direction that grows fastest.
_SEGMENTS_TO_SETTLE = 8
_MAX_SEGMENTS = 2048
_ROLLOUT_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How a small difference between two memories grows or fades as a model reads the same text into both.

    Attributes:
        growth: Factor by which it grows in each segment (geometric mean). Below 1 it fades, with everything
            that the memory holds. Above 1 the memory is chaotic: after enough segments, it depends on rounding errors
            more than on the text.
        num_segments: Number of segments over which `growth` is the mean.
    """

    growth: float
    num_segments: int

    @property
    def segments_to_double(self) -> float:
        """Segments until the difference has doubled; negative if it fades: until it is halved; infinite at 1."""
        if self.growth in {0.0, 1.0}:
            return -0.0 if not self.growth else math.inf
        return math.log(2) / math.log(self.growth)

    def to_dict(self) -> dict[str, float | int]:
        """Return the metrics as JSON values."""
        return {"growth_per_segment": self.growth, "num_segments": self.num_segments}

    def to_line(self) -> str:
        """Return the metrics as one line of text."""
        segments = self.segments_to_double
        if math.isinf(segments):
            fate = "it stays as large"
        elif segments > 0:
            fate = f"it doubles in {segments:,.1f} segments, so even rounding errors take over in time"
        else:
            fate = f"it is halved in {-segments:,.1f} segments"
        return f"a small change of the memory grows by x{self.growth:.3f} a segment: {fate}"


def measure_stability(model: nn.Module, corpus: Corpus, *, num_lanes: int = 8) -> Stability | None:
    """Return how a small difference in the memory grows or fades; None where it cannot be measured.

    It cannot without slots, if all documents are too short, or in half precision, whose rounding errors are too large.

    A second memory, which differs a little from the first in a random direction, reads the same segments. After every
    segment the difference is measured and scaled back to its size (the method of Benettin et al. 1980 for the largest
    Lyapunov exponent). The first 8 segments of a document are not counted; reading ends after about 2,048 that
    are.

    Args:
        model: The model.
        corpus: Documents; their token ids must be in the model's vocabulary.
        num_lanes: Number of documents read side by side.

    Raises:
        InputError: The corpus has another vocabulary than the model.
        InputTypeError: It is not a `Corpus`.
    """
    model = unwrapped(model)
    if not isinstance(model, MemoryEncoder) or not model.config.num_slots or _is_half(model):
        return None
    check_vocabulary(model, corpus)
    stream = LaneStream(
        corpus,
        num_lanes=min(num_lanes, corpus.num_documents),
        segment_length=model.segment_length,
        rollout_length=_ROLLOUT_LENGTH,
        bos_token_id=model.bos_token_id,
        num_epochs=1,
    )
    generator = torch.Generator().manual_seed(0)
    with reading(model):
        memory = model.initial_memory(stream.num_lanes)
        direction = torch.randn(memory.shape, generator=generator).to(memory)
        position = torch.zeros(len(memory), dtype=torch.int64, device=memory.device)
        logarithms, num_segments = [], 0
        for rollout in map(model.align_inputs, stream):
            on_device = rollout.to(memory.device)
            for timestep, segment in enumerate(on_device.inputs):
                assert on_device.reset is not None
                reset = on_device.reset[timestep]
                position = torch.where(reset, 0, position + 1)
                memory = model.reset_memory(memory, reset)
                change = _scaled(direction, like=memory)
                padding = None if on_device.input_padding is None else on_device.input_padding[timestep].repeat(2, 1)
                _, after = model.encode(
                    segment.repeat(2, 1), memory=torch.cat([memory, memory + change]), padding_mask=padding
                )
                memory, changed = after.chunk(2)
                direction = changed - memory
                counts = position >= _SEGMENTS_TO_SETTLE
                if padding is not None:
                    counts &= ~padding.chunk(2)[0].all(dim=-1)
                growth = _length(direction) / _length(change)
                logarithms.append(growth.double().log()[counts])
                num_segments += int(counts.sum())
                # A change that is gone leaves no direction; a new one is drawn.
                drawn = torch.randn(memory.shape, generator=generator).to(memory)
                direction = torch.where((growth == 0)[:, None, None], drawn, direction)
            if num_segments >= _MAX_SEGMENTS:
                break
    if not num_segments:
        return None
    return Stability(growth=float(torch.cat(logarithms).mean().exp()), num_segments=num_segments)


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype.itemsize < 4 for parameter in model.parameters())


def _scaled(direction: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    return direction * (_RELATIVE_CHANGE * _length(like) / _length(direction))[:, None, None]


def _length(memory: torch.Tensor) -> torch.Tensor:
    return memory.flatten(1).norm(dim=-1)
