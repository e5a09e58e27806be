"""Reading and decoding as CUDA graphs: one launch for a segment read, one for a token decoded."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.models.decoder import Past
from memformer.models.language_model import LanguageModel
from memformer.models.memformer import Memformer
from memformer.nn.attention import KeyValueCache
from memformer.utils.cuda_graphs import CannotRecord, GraphPool, RecordingFailed, Work
from memformer.utils.progress import print_warning

_said: set[str] = set()


def can_record(device: torch.device) -> bool:
    """Return whether work on this device can become a graph."""
    return device.type == "cuda"


def record_or_run(pool: GraphPool, work: Work, *, name: str) -> Work:
    """Return the recorded work, or the work itself if it cannot be recorded; that is said once."""
    try:
        return pool.record(work, before=lambda: None)
    except (CannotRecord, RecordingFailed) as error:
        sentence = f"{name} cannot become a CUDA graph and runs operation by operation: {error}"
        if sentence not in _said:
            _said.add(sentence)
            print_warning(sentence)
        return work


def identify(model: LanguageModel) -> list[int]:
    """Return the addresses of the weights; a graph works on the weights that are there, whatever their values."""
    return [weight.data_ptr() for weight in model.parameters()]


class RecordedReading:
    """`encode` of full segments without padding, recorded for one number of rows.

    Args:
        model: The model on a CUDA device, in evaluation mode.
        segment: Segments of the same shape as those of later calls.
        memory: Memory of the same shape as that of later calls.
    """

    def __init__(self, model: LanguageModel, segment: Int64[Tensor, "B S"], memory: Float[Tensor, "B K W"]) -> None:
        self.model = model
        self.weights = identify(model)
        self._segment, self._memory = segment.clone(), memory.clone()
        self._launch = record_or_run(GraphPool(model.device), self._encode, name="reading a segment")

    def _encode(self) -> None:
        self.hidden, self.next_memory = self.model.encode(self._segment, memory=self._memory)

    def __call__(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states and next memory, in tensors that the next call overwrites."""
        self._segment.copy_(segment, non_blocking=True)
        self._memory.copy_(memory)
        self._launch()
        return self.hidden, self.next_memory


class RecordedStep:
    """Decoding of one token per row, recorded for a session's caches; the first segment's padding is not supported.

    Args:
        model: The model on a CUDA device, in evaluation mode.
        step: `decoding.decode_step`, compiled or not.
        hidden: Hidden states of the previous segment; those of later segments must have the same shape.
        caches: The caches that the step reads and writes.

    Attributes:
        past: The past that the step reads; `restart` overwrites it.
    """

    def __init__(
        self, model: Memformer, step: Callable[..., Tensor], *, hidden: Tensor, caches: list[KeyValueCache]
    ) -> None:
        self.model = model
        self.step = step
        self._weights = identify(model)
        self._caches = caches
        self._hidden = hidden.clone()
        # Tokens and positions together, so that they are copied at once. Decoding padding does not change the caches.
        self._inputs = torch.tensor([model.bos_token_id, model.segment_length], device=model.device)
        self._inputs = self._inputs[:, None, None].repeat(1, hidden.shape[0], 1)
        self.past = model.precompute_past(self._hidden)
        pool = GraphPool(model.device)
        self._project = record_or_run(pool, self._fill_past, name="the past of a segment")
        self._launch = record_or_run(pool, self._decode, name="decoding a token")

    def is_stale(self, step: Callable[..., Tensor]) -> bool:
        """Return whether the step or the places of the model's weights have changed since recording."""
        return step is not self.step or identify(self.model) != self._weights

    def _fill_past(self) -> None:
        past = self.model.precompute_past(self._hidden)
        torch._foreach_copy_(_tensors(self.past), _tensors(past))

    def _decode(self) -> None:
        tokens, positions = self._inputs
        self.logits = self.step(self.model, tokens, self.past, self._caches, positions)

    def restart(self, hidden: Tensor) -> None:
        """Compute `past` from the hidden states of the previous segment."""
        self._hidden.copy_(hidden)
        self._project()

    def __call__(self, tokens: Int64[Tensor, "B 1"], positions: Int64[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
        """Return the next-token logits after each token; both arguments are on the CPU."""
        self._inputs.copy_(torch.stack([tokens, positions]), non_blocking=True)
        self._launch()
        return self.logits.clone()


def _tensors(past: Past) -> list[Tensor]:
    tensors = [tensor for pair in past.keys_values for tensor in pair]
    return tensors if past.start is None else [*tensors, past.start]
