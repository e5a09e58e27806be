"""Incremental decoding of a session's pending tokens: key-value caches and the compiled or recorded step."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.generation.compiling import compiled_function
from memformer.generation.recording import RecordedStep
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

    def __init__(self, model: Memformer, batch_size: int, *, compiled: bool = False) -> None:
        self.model = model
        self.compiled = compiled
        self.caches: list[KeyValueCache] = model.make_caches(batch_size)
        self.num_decoded = [0] * batch_size
        self.past: Past | None = None
        self.logits: Tensor | None = None
        self._recorded: RecordedStep | None = None
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
        if self.past is None:
            self.past = self._make_past(hidden, hidden_padding)
        # The decoder's inputs are [BOS], or what replaces it, and the pending tokens; some may be decoded already.
        num_new = [pending + 1 - done for pending, done in zip(num_pending, self.num_decoded, strict=True)]
        width = max(num_new)
        if width > 0:
            is_uniform = min(num_new) == width and min(self.num_decoded) == max(self.num_decoded)
            num_cached = self.num_decoded[0] if is_uniform else None
            inputs = torch.full((len(num_new), width), model.bos_token_id, device="cpu")
            positions = torch.full((len(num_new), width), model.segment_length, device="cpu")  # marks padding
            for row, (count, done) in enumerate(zip(num_new, self.num_decoded, strict=True)):
                first_token = 1 if done == 0 else 0
                inputs[row, first_token:count] = tokens[row, done - 1 + first_token : done - 1 + count]
                positions[row, :count] = torch.arange(done, done + count, device="cpu")
            if self._step is not None and width == 1:
                logits = self._step(inputs, positions)
            else:
                logits = model.decode_step(
                    inputs.to(device),
                    past=self.past,
                    caches=self.caches,
                    positions=positions.to(device),
                    num_cached=num_cached,
                )
            if min(num_new) == width:
                self.logits = logits[:, -1]
            else:
                last = torch.tensor([max(count - 1, 0) for count in num_new], device=device)
                latest = logits[torch.arange(len(num_new), device=device), last]
                is_unchanged = torch.tensor([count == 0 for count in num_new], device=device)[:, None]
                self.logits = latest if self.logits is None else torch.where(is_unchanged, self.logits, latest)
            # Only now: after an interrupt or an error, the same tokens are decoded again.
            self.num_decoded = [pending + 1 for pending in num_pending]
        assert self.logits is not None
        return self.logits

    def _make_past(self, hidden: Tensor, hidden_padding: Tensor) -> Past:
        # A mask slows down every token; after the first segment there is no padding to mask.
        padding = hidden_padding if hidden_padding.any() else None
        past = self.model.precompute_past(hidden, hidden_padding_mask=padding)
        self._step = self._make_step(past, hidden) if padding is None else None
        return past

    def _make_step(self, past: Past, hidden: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return the compiled step, or the recorded one on CUDA; None if there is neither."""
        model, caches = self.model, self.caches
        step: Callable[..., Tensor] = decode_step
        if self.compiled:
            bos = torch.full((hidden.shape[0], 1), model.bos_token_id, device=model.device)
            padding = torch.full_like(bos, model.segment_length)  # does not change the cached tokens
            step = compiled_function(decode_step, model, (bos, past, caches, padding), key=("decode", len(hidden)))
        if model.device.type == "cuda":
            if self._recorded is None or self._recorded.is_stale(step):
                self._recorded = RecordedStep(model, step, hidden=hidden, caches=caches)
            self._recorded.restart(hidden)
            return self._recorded
        return (lambda tokens, positions: step(model, tokens, past, caches, positions)) if self.compiled else None


def decode_step(
    model: Memformer, tokens: Tensor, past: Past, caches: list[KeyValueCache], positions: Tensor
) -> Float[Tensor, "B 1 V"]:
    """Return `Memformer.decode_step` of one token per row, as a function that can be compiled."""
    return model.decode_step(tokens, past=past, caches=caches, positions=positions)
