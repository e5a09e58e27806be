"""Rollout: the batch of consecutive segments that one update backpropagates through."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memformer.errors import InputError, InputTypeError
from memformer.utils.checks import Integers, check_flag, check_integers, check_type


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors are not compared with ==
class Rollout:
    """N timesteps of B independent rows: input segments, target segments, and where new documents start.

    Timestep t reads `inputs[t]` and predicts `targets[t]`, the segment that follows it.

    Args:
        inputs: (N, B, S) int64, the segments that the encoder reads.
        targets: (N, B, T) int64, the segments that the decoder predicts; for a classifier the labels, (N, B, 1).
        reset: (N, B) bool, True where a row starts a new document: its memory is set to the initial memory before that
            timestep. None: no row is reset.
        input_padding: (N, B, S) bool, True at padding of `inputs`, before or after the tokens of a row but not between
            them. None: no padding.
        target_padding: (N, B, T) bool, True at padding of `targets` and at targets that are excluded from the loss.
            Excluded targets are still read: as inputs of the decoder for the targets after them, and as the next
            timestep's inputs. None: all targets count. A model that predicts a next token at every input reads excluded
            targets at the end of a timestep only if the rollout has the next one: do not cut a rollout there.
        decoder_start_ids: (N, B) int64, the token ids that the decoder starts from. None: `[BOS]` everywhere. A model
            with `decoder_start_tokens` starts from the last input instead of `[BOS]`; other ids stand in its place.
        targets_are_answers: The inputs are read in full before the targets are predicted, as in recall tasks; otherwise
            the targets are the next segment.
        is_shifted: The rollout is for models that predict a next token at every input: `inputs` and `targets` have the
            same shape, and `targets[..., n]` follows `inputs[..., n]`.
        is_filler: (N, B) bool, True at inputs that are known to contain nothing to remember, for the write penalty
            (see `MemoryWriter`). None: known of none.

    Raises:
        InputError: The shapes disagree, there is no timestep, row or token, or there is padding between tokens of
            `inputs` (checked on a CPU only).
        InputTypeError: Tokens are not int64, or masks are not bool.
    """

    inputs: Tensor
    targets: Tensor
    reset: Tensor | None = None
    input_padding: Tensor | None = None
    target_padding: Tensor | None = None
    decoder_start_ids: Tensor | None = None
    targets_are_answers: bool = False
    is_shifted: bool = False
    is_filler: Tensor | None = None

    def __post_init__(self) -> None:
        check_flag("targets_are_answers", self.targets_are_answers)
        check_flag("is_shifted", self.is_shifted)
        for name in ("inputs", "targets"):
            tokens: Tensor = getattr(self, name)
            check_type(f"rollout {name}", tokens, Tensor)
            if tokens.dtype != torch.int64:
                raise InputTypeError(f"rollout {name} have dtype {tokens.dtype}; token ids must be torch.int64")
            if tokens.ndim != 3 or 0 in tokens.shape:
                raise InputError(
                    f"rollout {name} have shape {tuple(tokens.shape)}; the shape must be (timesteps, rows, tokens), "
                    "with no dimension equal to zero"
                )
        if self.inputs.shape[:2] != self.targets.shape[:2]:
            raise InputError(
                f"rollout inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)} "
                "must agree in timesteps and rows"
            )
        if self.is_shifted and self.inputs.shape != self.targets.shape:
            raise InputError(
                f"rollout inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)} "
                "must have the same shape if is_shifted is true: a target follows each input"
            )
        expected_shapes = {
            "reset": self.inputs.shape[:2],
            "is_filler": self.inputs.shape[:2],
            "input_padding": self.inputs.shape,
            "target_padding": self.targets.shape,
        }
        for name, shape in expected_shapes.items():
            check_mask(getattr(self, name), shape=shape, name=f"rollout {name}")
        if not self.is_shifted:
            check_padding_outside(self.input_padding, name="rollout input_padding")
        if self.decoder_start_ids is not None:
            check_type("rollout decoder_start_ids", self.decoder_start_ids, Tensor)
            if self.decoder_start_ids.dtype != torch.int64:
                raise InputTypeError(
                    f"rollout decoder_start_ids have dtype {self.decoder_start_ids.dtype}; "
                    "token ids must be torch.int64"
                )
            if self.decoder_start_ids.shape != self.inputs.shape[:2]:
                raise InputError(
                    f"rollout decoder_start_ids have shape {tuple(self.decoder_start_ids.shape)}; "
                    f"the shape must be {tuple(self.inputs.shape[:2])}"
                )

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps N, one segment per row each."""
        return self.inputs.shape[0]

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.inputs.shape[1]

    def __getitem__(self, timesteps: slice) -> "Rollout":
        """Return a slice of the timesteps, as views.

        Raises:
            InputError: The slice has another step than 1, so that it is not a rollout.
            InputTypeError: It is not a slice.
        """
        check_type("timesteps", timesteps, slice, hint=", as in rollout[2:5]")
        if timesteps.step not in (None, 1):
            raise InputError(f"the step of timesteps ({timesteps.step}) must be 1: a memory goes from each to the next")

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[timesteps]

        return Rollout(
            inputs=self.inputs[timesteps],
            targets=self.targets[timesteps],
            reset=cut(self.reset),
            input_padding=cut(self.input_padding),
            target_padding=cut(self.target_padding),
            decoder_start_ids=cut(self.decoder_start_ids),
            targets_are_answers=self.targets_are_answers,
            is_shifted=self.is_shifted,
            is_filler=cut(self.is_filler),
        )

    def count_input_tokens(self) -> int:
        """Return the number of input tokens that are not padding."""
        return _count(self.inputs, self.input_padding)

    def count_target_tokens(self) -> int:
        """Return the number of target tokens that are not padding."""
        return _count(self.targets, self.target_padding)

    def to(self, device: torch.device | str) -> "Rollout":
        """Return the same rollout with all tensors on `device`."""
        # A copy to the CPU that does not wait could be read before it is there.
        is_to_cpu = torch.device(device).type == "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=not is_to_cpu))

    def select_rows(self, rows: Integers) -> "Rollout":
        """Return the rollout with these rows only, in this order.

        Args:
            rows: Numbers of the rows, from 0, or one number; a row may be given twice.

        Raises:
            InputError: There is no row with this number.
            InputTypeError: A number is not an integer.
        """
        chosen = check_integers("row", rows, 0, self.batch_size - 1)  # PyTorch would take a mask for the rows 0 and 1
        return self._map(lambda tensor: tensor[:, chosen])

    def shifted_by_one_token(self) -> "Rollout":
        """Return the rollout for next-token models: the same targets, each with the preceding token as its input.

        A timestep's new inputs are the last token of its old inputs and all its targets but the last. The input of a
        padded target is padding. A target that is excluded from the loss is known from padding by a target behind it
        that counts, or by the next timestep's inputs, which are the same tokens; so excluded targets at the very end of
        the rollout are taken for padding. If the targets are answers, the inputs stay, and the answer is the target of
        the last input token. A shifted rollout is returned as it is.

        Raises:
            InputError: `decoder_start_ids` are given, for which a next-token model has no input; or an answer has
                several tokens, of which the last input predicts only one.
        """
        if self.is_shifted:
            return self
        if self.decoder_start_ids is not None:
            raise InputError(
                "a rollout with decoder_start_ids (multi-task training) can be read only by a Memformer; "
                "it cannot be shifted"
            )
        if self.targets_are_answers:
            return self._with_answers_at_last_inputs()
        previous = self.inputs[..., -1:]
        if self.input_padding is not None:
            previous = self.inputs.gather(-1, last_token_indices(self.input_padding)[..., None])
        return dataclasses.replace(
            self,
            inputs=torch.cat([previous, self.targets[..., :-1]], dim=-1),
            input_padding=None if self.target_padding is None else self._unread_targets(self.target_padding),
            is_shifted=True,
        )

    def _unread_targets(self, target_padding: Tensor) -> Tensor:
        """Return True at targets that are padding: they do not count, and nothing shows that they are read."""
        is_read = (~target_padding).flip(-1).cumsum(dim=-1).flip(-1) > 0
        if self.inputs.shape == self.targets.shape:
            follows = torch.ones_like(is_read[1:])
            if self.input_padding is not None:
                follows = ~self.input_padding[1:]
            is_same = ((self.inputs[1:] == self.targets[:-1]) | ~follows).all(dim=-1, keepdim=True)
            if self.reset is not None:
                is_same = is_same & ~self.reset[1:, :, None]
            is_read[:-1] |= follows & is_same
        return ~is_read

    def _with_answers_at_last_inputs(self) -> "Rollout":
        answer_length = self.targets.shape[-1]
        if answer_length > 1:
            raise InputError(
                f"answers have up to {answer_length} tokens; a model that predicts the next token of what it reads can "
                "be asked for one token only"
            )
        last = torch.full_like(self.targets, self.inputs.shape[-1] - 1)
        if self.input_padding is not None:
            last = last_token_indices(self.input_padding)[..., None]
        padding = self.target_padding
        if padding is None:
            padding = torch.zeros_like(self.targets, dtype=torch.bool)
        return dataclasses.replace(
            self,
            targets=torch.zeros_like(self.inputs).scatter(-1, last, self.targets),
            target_padding=torch.ones_like(self.inputs, dtype=torch.bool).scatter(-1, last, padding),
            is_shifted=True,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value for name, value in fields.items()
        }
        return Rollout(**changed)


def check_mask(mask: Tensor | None, *, shape: torch.Size, name: str) -> None:
    """Check the shape and the dtype of a mask; None is valid.

    Raises:
        InputError: The shape is not `shape`.
        InputTypeError: It is not a tensor, or its dtype is not bool.
    """
    if mask is None:
        return
    check_type(name, mask, Tensor)
    if mask.dtype != torch.bool:
        raise InputTypeError(f"{name} has dtype {mask.dtype}; it must be torch.bool")
    if mask.shape != shape:
        raise InputError(f"{name} has shape {tuple(mask.shape)}; it must be {tuple(shape)}")


def check_padding_outside(padding_mask: Tensor | None, *, name: str) -> None:
    """Check on a CPU that padding (..., S) is before or after the tokens of each row, not between them.

    Raises:
        InputError: It is between them.
    """
    if padding_mask is None or padding_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    begins = padding_mask[..., :-1] & ~padding_mask[..., 1:]
    if (begins.sum(dim=-1) + (~padding_mask[..., :1]).sum(dim=-1) > 1).any():
        raise InputError(f"{name} is True between tokens of a row; padding must be before or after them")


def check_targets_have_inputs(rollout: Rollout, *, target: str) -> None:
    """Check that no target counts at a timestep without an input token: its state is finite but meaningless.

    Only on a CPU: elsewhere it would synchronize the device.

    Args:
        rollout: The rollout.
        target: What the targets are, in the message.

    Raises:
        InputError: One does.
    """
    if rollout.input_padding is None or rollout.input_padding.device.type != "cpu":
        return
    is_empty = rollout.input_padding.all(dim=-1, keepdim=True)
    wrong = is_empty if rollout.target_padding is None else is_empty & ~rollout.target_padding
    if wrong.any():
        timestep, row, _ = wrong.nonzero()[0].tolist()
        raise InputError(
            f"timestep {timestep} of row {row} has {target} but no input token; mask targets that do not count with "
            "target_padding"
        )


def last_token_indices(padding_mask: Tensor) -> Tensor:
    """Return the index of the last token in each row of a padding mask (..., S); 0 for a row that is all padding."""
    indices = torch.arange(padding_mask.shape[-1], device=padding_mask.device)
    return indices.masked_fill(padding_mask, 0).amax(dim=-1)


def _count(tokens: Tensor, padding: Tensor | None) -> int:
    return tokens.numel() if padding is None else int((~padding).sum())
