"""Decoding one token after the other: what is pending in a session, its caches, and the step, compiled if asked."""

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
    """The decoder's work on the present segments: derived from a session's state, so it is never saved.

    Args:
        model: The model that decodes.
        batch_size: Number of rows.
        compiled: Whether a step of one token in every row is compiled, from the second segment on.

    Raises:
        InputError: The step is to be compiled, and the model's positions are relative.
    """

    def __init__(self, model: Memformer, batch_size: int, *, compiled: bool = False) -> None:
        if compiled and model.config.positions != "rotary":
            # The distances that occur decide the shapes there.
            raise InputError(f"a decoding step with positions {model.config.positions!r} cannot be compiled")
        self.model = model
        self.compiled = compiled
        self.caches: list[KeyValueCache] = model.make_caches(batch_size)
        self.num_decoded = [0] * batch_size
        self.past: Past | None = None
        self.logits: Tensor | None = None
        self._step: CompiledStep | None = None

    def restart(self, rows: list[int]) -> None:
        """Forget what was decoded in these rows: their past has changed."""
        self.past = None
        for row in rows:
            self.num_decoded[row] = 0

    def advance(
        self, tokens: Int64[Tensor, "B S"], num_pending: list[int], *, hidden: Tensor, hidden_padding: Tensor
    ) -> Float[Tensor, "B V"]:
        """Decode what is pending and not yet decoded; return the logits that follow each row's last token.

        Raises:
            InputError: The step is to be compiled, and it cannot be.
        """
        model, device = self.model, self.model.device
        if self.past is None:
            self.past = self._look_back(hidden, hidden_padding)
        # The decoder's inputs are [BOS] and the pending tokens; each row has decoded some of them already.
        todo = [pending + 1 - done for pending, done in zip(num_pending, self.num_decoded, strict=True)]
        width = max(todo)
        if width > 0:
            abreast = min(todo) == width and min(self.num_decoded) == max(self.num_decoded)
            num_cached = self.num_decoded[0] if abreast else None
            inputs = torch.full((len(todo), width), model.bos_token_id)
            positions = torch.full((len(todo), width), model.segment_length)  # marks padding
            for row, (count, done) in enumerate(zip(todo, self.num_decoded, strict=True)):
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
            if min(todo) == width:
                self.logits = logits[:, -1]
            else:
                last = torch.tensor([max(count - 1, 0) for count in todo], device=device)
                latest = logits[torch.arange(len(todo), device=device), last]
                waiting = torch.tensor([count == 0 for count in todo], device=device)[:, None]
                self.logits = latest if self.logits is None else torch.where(waiting, self.logits, latest)
        assert self.logits is not None
        return self.logits

    def _look_back(self, hidden: Tensor, hidden_padding: Tensor) -> Past:
        # A mask costs time at every token; after the first segment there is nothing to mask.
        padding = hidden_padding if hidden_padding.any() else None
        past = self.model.look_back(hidden, hidden_padding_mask=padding)
        self._step = compiled_step(self.model, past, self.caches) if self.compiled and padding is None else None
        return past


_compiled_steps: WeakKeyDictionary[Memformer, dict[int, "CompiledStep"]] = WeakKeyDictionary()


def compiled_step(model: Memformer, past: Past, caches: list[KeyValueCache]) -> "CompiledStep":
    """Return the compiled step of a model for so many rows: the one at hand, while the weights are the same.

    Raises:
        InputError: torch cannot compile.
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
    """`Memformer.decode_step` of one token in every row, compiled by torch for a model, its weights and its shapes.

    A step of few rows is small: run operation by operation, most of its time goes to starting them. Compiled, the
    weights are laid out anew for products with few rows; they are held a second time.

    Args:
        model: In evaluation mode.
        past: A segment's past, without padding; others have the same shapes.
        caches: Some caches; others have the same shapes.

    Raises:
        InputError: torch cannot compile, most often because there is no C++ compiler.
    """

    def __init__(self, model: Memformer, *, past: Past, caches: list[KeyValueCache]) -> None:
        # Only here: torch's compiler takes a second to import.
        import torch._inductor.config as inductor_config
        from torch._inductor.exc import InductorError

        self._weights = _identify_weights(model)
        self._step = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack isolate_recompiles
            _step,
            fullgraph=True,
            dynamic=False,
            # What is compiled here serves this model alone, so the model need not be examined at every token.
            isolate_recompiles=True,
            options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
        )
        rows = caches[0].keys.shape[0]
        bos = torch.full((rows, 1), model.bos_token_id, device=model.device)
        padding = torch.full_like(bos, model.segment_length)  # decoding padding leaves the caches' tokens as they are
        options = {
            "freezing": True,
            "cpp_wrapper": model.device.type == "cpu",
            "max_autotune_gemm": True,
            "autotune_num_choices_displayed": 0,
        }
        try:
            with inductor_config.patch(options), warnings.catch_warnings():
                # Of torch, about itself.
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
        """Return the logits of what follows each token; the model must be the one that was compiled."""
        with torch.no_grad():
            logits: Tensor = self._step(model, tokens, past=past, caches=caches, positions=positions)
        return logits

    def is_stale(self, model: Memformer) -> bool:
        """Whether the model's weights have changed since."""
        return _identify_weights(model) != self._weights


def _identify_weights(model: Memformer) -> list[tuple[int, int]]:
    """Return where each weight lies, and how often it was changed in place."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]
