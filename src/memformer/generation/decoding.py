"""Incremental decoding of a session's pending tokens: key-value caches and the optionally compiled step."""

import warnings
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from memformer.errors import InputError
from memformer.models.decoder import Past
from memformer.models.memformer import Memformer
from memformer.nn.attention import KeyValueCache


class Decoding:
    """Decoder state of the current segments; it is derived from a session's state, so it is never saved.

    Args:
        model: The model that decodes.
        batch_size: Number of rows.
        compiled: Whether the step of one token per row is compiled; used from the second segment on.

    Raises:
        InputError: `compiled` is set and the model's positions are relative.
    """

    def __init__(self, model: Memformer, batch_size: int, *, compiled: bool = False) -> None:
        if compiled and model.config.positions != "rotary":
            # With relative positions, shapes depend on the distances that occur.
            raise InputError(f"positions ({model.config.positions!r}) must be 'rotary' to compile the decoding step")
        self.model = model
        self.compiled = compiled
        self.caches: list[KeyValueCache] = model.make_caches(batch_size)
        self.num_decoded = [0] * batch_size
        self.past: Past | None = None
        self.logits: Tensor | None = None
        self._step: CompiledStep | None = None

    def restart(self, rows: list[int]) -> None:
        """Discard the decoded tokens of these rows, because their past has changed."""
        self.past = None
        for row in rows:
            self.num_decoded[row] = 0

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
        # The decoder's inputs are [BOS] and the pending tokens; some of them may be decoded already.
        num_new = [pending + 1 - done for pending, done in zip(num_pending, self.num_decoded, strict=True)]
        width = max(num_new)
        if width > 0:
            is_uniform = min(num_new) == width and min(self.num_decoded) == max(self.num_decoded)
            num_cached = self.num_decoded[0] if is_uniform else None
            inputs = torch.full((len(num_new), width), model.bos_token_id)
            positions = torch.full((len(num_new), width), model.segment_length)  # marks padding
            for row, (count, done) in enumerate(zip(num_new, self.num_decoded, strict=True)):
                first_token = 1 if done == 0 else 0
                inputs[row, first_token:count] = tokens[row, done - 1 + first_token : done - 1 + count]
                positions[row, :count] = torch.arange(done, done + count)
                self.num_decoded[row] += count
            inputs, positions = inputs.to(device), positions.to(device)
            if self._step is not None and width == 1:
                logits = self._step(model, inputs, past=self.past, caches=self.caches, positions=positions)
            else:
                logits = model.decode_step(
                    inputs, past=self.past, caches=self.caches, positions=positions, num_cached=num_cached
                )
            if min(num_new) == width:
                self.logits = logits[:, -1]
            else:
                last = torch.tensor([max(count - 1, 0) for count in num_new], device=device)
                latest = logits[torch.arange(len(num_new), device=device), last]
                is_unchanged = torch.tensor([count == 0 for count in num_new], device=device)[:, None]
                self.logits = latest if self.logits is None else torch.where(is_unchanged, self.logits, latest)
        assert self.logits is not None
        return self.logits

    def _make_past(self, hidden: Tensor, hidden_padding: Tensor) -> Past:
        # A mask slows down every token; after the first segment there is no padding to mask.
        padding = hidden_padding if hidden_padding.any() else None
        past = self.model.precompute_cross_attention(hidden, hidden_padding_mask=padding)
        self._step = compiled_step(self.model, past, self.caches) if self.compiled and padding is None else None
        return past


_compiled_steps: WeakKeyDictionary[Memformer, dict[int, "CompiledStep"]] = WeakKeyDictionary()


def compiled_step(model: Memformer, past: Past, caches: list[KeyValueCache]) -> "CompiledStep":
    """Return the compiled step of a model for this number of rows; it is reused until the weights change.

    Raises:
        InputError: PyTorch cannot compile the step.
    """
    steps = _compiled_steps.setdefault(model, {})
    rows = caches[0].keys.shape[0]
    if rows not in steps or steps[rows].is_stale(model):
        steps[rows] = CompiledStep(model, past=past, caches=caches)
    return steps[rows]


def _step(
    model: Memformer, tokens: Tensor, *, past: Past, caches: list[KeyValueCache], positions: Tensor
) -> Float[Tensor, "B 1 V"]:
    return model.decode_step(tokens, past=past, caches=caches, positions=positions)


class CompiledStep:
    """`Memformer.decode_step` of one token per row, compiled by PyTorch for a model, its weights and its shapes.

    A step with few rows is small: uncompiled, most of its time is the overhead of launching operations. The compiled
    step holds a second copy of the weights, in a layout for products with few rows.

    Args:
        model: The model, in evaluation mode.
        past: Past of a segment, without padding; the past of later calls must have the same shapes.
        caches: Key-value caches; the caches of later calls must have the same shapes.

    Raises:
        InputError: PyTorch cannot compile the step, usually because there is no C++ compiler.
    """

    def __init__(self, model: Memformer, *, past: Past, caches: list[KeyValueCache]) -> None:
        # Imported here, because importing PyTorch's compiler takes a second.
        import torch._inductor.config as inductor_config
        from torch._inductor.exc import InductorError

        self._weights = _identify_weights(model)
        self._step = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack isolate_recompiles
            _step,
            fullgraph=True,
            dynamic=False,
            # The compiled code is for this model only, so the model need not be checked at every token.
            isolate_recompiles=True,
            options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
        )
        rows = caches[0].keys.shape[0]
        bos = torch.full((rows, 1), model.bos_token_id, device=model.device)
        padding = torch.full_like(bos, model.segment_length)  # decoding padding does not change the cached tokens
        options = {
            "freezing": True,
            "cpp_wrapper": model.device.type == "cpu",
            "max_autotune_gemm": True,
            "autotune_num_choices_displayed": 0,
        }
        try:
            with inductor_config.patch(options), warnings.catch_warnings():
                # Raised by PyTorch's own code.
                warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
                self(model, bos, past=past, caches=caches, positions=padding)
        except InductorError as error:
            raise InputError(
                f"the decoding step cannot be compiled: {str(error).splitlines()[0]}; "
                "torch needs a C++ compiler (g++ or clang); without one, decode uncompiled"
            ) from error

    def __call__(
        self,
        model: Memformer,
        tokens: Int64[Tensor, "B 1"],
        *,
        past: Past,
        caches: list[KeyValueCache],
        positions: Int64[Tensor, "B 1"],
    ) -> Float[Tensor, "B 1 V"]:
        """Return the next-token logits after each token; the model must be the one that was compiled."""
        with torch.no_grad():
            logits: Tensor = self._step(model, tokens, past=past, caches=caches, positions=positions)
        return logits

    def is_stale(self, model: Memformer) -> bool:
        """Return whether the model's weights have changed since compilation."""
        return _identify_weights(model) != self._weights


def _identify_weights(model: Memformer) -> list[tuple[int, int]]:
    """Return the address of each weight and the number of its in-place changes."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]
