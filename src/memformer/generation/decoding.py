"""Incremental decoding of a session's pending tokens: key-value caches and the compiled or recorded step."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.generation.changed_weights import WeightsTrace
from memformer.generation.compiling import compiled_function
from memformer.generation.pending_tokens import last_of_each_row, new_tokens
from memformer.generation.recording import RecordedStep, can_record
from memformer.models.decoder import Past
from memformer.models.memformer import Memformer
from memformer.nn.attention import KeyValueCache


class Decoding:
    """Decoder state of the current segments; it is derived from a session's state, so it is never saved.

    Args:
        model: The model that decodes.
        batch_size: Number of rows.
        compiled: Whether the step of one token per row is compiled; used from the second segment on.
    """

    # A short answer is decoded sooner than recorded.
    _DECODED_BEFORE_RECORDING = 8

    def __init__(self, model: Memformer, batch_size: int, *, compiled: bool = False) -> None:
        self.model = model
        self.compiled = compiled
        self.caches: list[KeyValueCache] = model.make_caches(batch_size)
        self.num_decoded = [0] * batch_size
        self.past: Past | None = None
        self.logits: Tensor | None = None
        self._recorded: RecordedStep | None = None
        self._num_steps = 0
        self._trace = WeightsTrace(model)
        # Whether the current segment can have a compiled or recorded step: not the first, whose past has padding.
        self._has_step = False
        # Decodes one token per row, given tokens and positions (B, 1) on the CPU.
        self._step: Callable[[Tensor, Tensor], Tensor] | None = None

    def restart(self, rows: Iterable[int]) -> None:
        """Discard the decoded tokens of these rows, because their past has changed."""
        self.past = None
        for row in rows:
            self.num_decoded[row] = 0

    def select_rows(self, rows: Int64[Tensor, " R"]) -> None:
        """Replace the rows by copies of these, with what is decoded of them."""
        if len(rows) != len(self.num_decoded):
            self._recorded = None
        for cache in self.caches:
            cache.select_rows(rows)
        self.num_decoded = [self.num_decoded[row] for row in rows.tolist()]
        self.logits = None if self.logits is None else self.logits[rows]
        # A compiled or recorded step holds the past, so it is made again.
        self.past = self.past.select_rows(rows) if self.past is not None and self._step is None else None

    def advance(
        self, tokens: Int64[Tensor, "B S"], num_pending: list[int], *, hidden: Tensor, hidden_padding: Tensor
    ) -> Float[Tensor, "B V"]:
        """Decode pending tokens that are not decoded yet; return the logits after each row's last token.

        Raises:
            InputError: `compiled` is set and PyTorch cannot compile the step.
        """
        model, device = self.model, self.model.device
        if self._trace.has_changed():  # a training step: what was decoded is of old weights
            self.restart(range(len(self.num_decoded)))
            self._trace.accept()
        if self.past is None:
            self._begin_segment(hidden, hidden_padding)
        # The decoder's inputs are [BOS], or what replaces it, and the pending tokens; some may be decoded already.
        num_new = [pending + 1 - done for pending, done in zip(num_pending, self.num_decoded, strict=True)]
        width = max(num_new)
        if width == 1 and self._step is None and self._has_step:
            self._prepare_step(hidden)
        if width > 0:
            is_uniform = min(num_new) == width and min(self.num_decoded) == max(self.num_decoded)
            num_cached = self.num_decoded[0] if is_uniform else None
            start = torch.full((len(num_new), 1), model.bos_token_id, device="cpu")
            inputs, positions = new_tokens(
                torch.cat([start, tokens], dim=1),
                num_new=num_new,
                num_read=self.num_decoded,
                padding_position=model.segment_length,
            )
            if self._step is not None and width == 1:
                logits = self._step(inputs, positions)
            else:
                assert self.past is not None
                logits = model.decode_step(
                    inputs.to(device),
                    past=self.past,
                    caches=self.caches,
                    positions=positions.to(device),
                    num_cached=num_cached,
                )
            self.logits = last_of_each_row(logits, num_new=num_new, earlier=self.logits)
            # Only now: after an interrupt or an error, the same tokens are decoded again.
            self.num_decoded = [pending + 1 for pending in num_pending]
        assert self.logits is not None
        return self.logits

    def _begin_segment(self, hidden: Tensor, hidden_padding: Tensor) -> None:
        """Compute the past; keep the recorded step of earlier segments, if it suits."""
        # A mask slows down every token; after the first segment there is no padding to mask.
        padding = hidden_padding if hidden_padding.any() else None
        self._has_step, self._step, recorded = padding is None, None, self._recorded
        if recorded is not None and padding is None and not recorded.is_stale(self._function(recorded.past)):
            recorded.restart(hidden)
            self.past, self._step = recorded.past, recorded
        else:
            self.past = self.model.precompute_past(hidden, hidden_padding_mask=padding)

    def _prepare_step(self, hidden: Tensor) -> None:
        """Compile the step of the current segment, or on CUDA record it, if enough tokens were decoded."""
        assert self.past is not None
        self._num_steps += 1
        if can_record(self.model.device):
            if self.compiled or self._num_steps > self._DECODED_BEFORE_RECORDING:
                step = self._function(self.past)
                self._recorded = RecordedStep(self.model, step, hidden=hidden, caches=self.caches)
                self.past, self._step = self._recorded.past, self._recorded
        elif self.compiled:
            function, model, past, caches = self._function(self.past), self.model, self.past, self.caches
            self._step = lambda tokens, positions: function(model, tokens, past, caches, positions)

    def _function(self, past: Past) -> Callable[..., Tensor]:
        """Return `decode_step`, compiled if the session is."""
        if not self.compiled:
            return decode_step
        rows = len(self.num_decoded)
        bos = torch.full((rows, 1), self.model.bos_token_id, device=self.model.device)
        padding = torch.full_like(bos, self.model.segment_length)  # does not change the cached tokens
        return compiled_function(decode_step, self.model, (bos, past, self.caches, padding), key=("decode", rows))


def decode_step(
    model: Memformer, tokens: Tensor, past: Past, caches: list[KeyValueCache], positions: Tensor
) -> Float[Tensor, "B 1 V"]:
    """Return `Memformer.decode_step` of one token per row, as a function that can be compiled."""
    return model.decode_step(tokens, past=past, caches=caches, positions=positions)
