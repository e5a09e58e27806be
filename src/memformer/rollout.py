"""The segments that one update back-propagates through."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memformer.errors import InputError, InputTypeError


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """N timesteps of B independent rows: what is read, what must be predicted, and where rows start again.

    Timestep t reads `inputs[t]` and predicts `targets[t]`, the segment that follows it.

    Args:
        inputs: (N, B, S) int64, the segments the encoder reads.
        targets: (N, B, T) int64, the segments the decoder predicts.
        reset: (N, B) bool, True where a row starts a new document: its memory is the initial memory again
            before that timestep. None means nowhere.
        input_padding: (N, B, S) bool, True at padding of `inputs`. None means no padding.
        target_padding: (N, B, T) bool, True at padding of `targets` and at targets that are not to be predicted, whose
            loss does not count; targets after them in the segment are predicted from them nevertheless. None means
            none.
        starts: (N, B) int64, what the decoder starts from in place of `[BOS]`. None means `[BOS]` everywhere.

    Raises:
        InputError: The shapes disagree, or there is no timestep, row or token.
        InputTypeError: Tokens are not int64, or masks are not bool.
    """

    inputs: Tensor
    targets: Tensor
    reset: Tensor | None = None
    input_padding: Tensor | None = None
    target_padding: Tensor | None = None
    starts: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            tokens: Tensor = getattr(self, name)
            if tokens.dtype != torch.int64:
                raise InputTypeError(f"rollout {name} have dtype {tokens.dtype}; token ids must be torch.int64")
            if tokens.ndim != 3 or 0 in tokens.shape:
                raise InputError(
                    f"rollout {name} have shape {tuple(tokens.shape)}; it must be (timesteps, rows, tokens), none zero"
                )
        if self.inputs.shape[:2] != self.targets.shape[:2]:
            raise InputError(
                f"rollout inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)} "
                "must agree in timesteps and rows"
            )
        expected_shapes = {
            "reset": self.inputs.shape[:2],
            "input_padding": self.inputs.shape,
            "target_padding": self.targets.shape,
        }
        for name, shape in expected_shapes.items():
            check_mask(getattr(self, name), shape=shape, name=f"rollout {name}")
        if self.starts is not None:
            if self.starts.dtype != torch.int64:
                raise InputTypeError(f"rollout starts have dtype {self.starts.dtype}; token ids must be torch.int64")
            if self.starts.shape != self.inputs.shape[:2]:
                raise InputError(
                    f"rollout starts have shape {tuple(self.starts.shape)}; it must be {tuple(self.inputs.shape[:2])}"
                )

    @property
    def num_timesteps(self) -> int:
        """Number of segments N that each row reads."""
        return self.inputs.shape[0]

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.inputs.shape[1]

    def __getitem__(self, timesteps: slice) -> "Rollout":
        """Return some of the timesteps, as views."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[timesteps]

        return Rollout(
            inputs=self.inputs[timesteps],
            targets=self.targets[timesteps],
            reset=cut(self.reset),
            input_padding=cut(self.input_padding),
            target_padding=cut(self.target_padding),
            starts=cut(self.starts),
        )

    def count_input_tokens(self) -> int:
        """Return the number of input tokens that are not padding."""
        return _count(self.inputs, self.input_padding)

    def count_target_tokens(self) -> int:
        """Return the number of target tokens that are not padding."""
        return _count(self.targets, self.target_padding)

    def to(self, device: torch.device | str) -> "Rollout":
        """Return the same rollout with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def select_rows(self, rows: Sequence[int] | NDArray[np.integer]) -> "Rollout":
        """Return the rollout of these rows alone."""
        return self._map(lambda tensor: tensor[:, rows])

    def shifted_by_one_token(self) -> "Rollout":
        """Return the same targets, each beside the token before it as its input: how next-token models read.

        A timestep's inputs are the last token that it read and all its targets but the last; where a target does not
        count its input is padding. So targets that must be read but not predicted (recall tasks) cannot be shifted.

        Raises:
            InputError: What the decoder starts from is given: there is no place for it.
        """
        if self.starts is not None:
            raise InputError("a rollout with starts (multi-task training) is for a Memformer: it cannot be shifted")
        before = self.inputs[..., -1:]
        if self.input_padding is not None:
            before = self.inputs.gather(-1, last_places(self.input_padding)[..., None])
        return dataclasses.replace(
            self, inputs=torch.cat([before, self.targets[..., :-1]], dim=-1), input_padding=self.target_padding
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: None if tensor is None else change(tensor) for name, tensor in fields.items()}
        return Rollout(**changed)


def check_mask(mask: Tensor | None, *, shape: torch.Size, name: str) -> None:
    """Check a mask, where there is one.

    Raises:
        InputError: It has another shape than what it masks.
        InputTypeError: It is not bool.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise InputTypeError(f"{name} has dtype {mask.dtype}; it must be torch.bool")
    if mask.shape != shape:
        raise InputError(f"{name} has shape {tuple(mask.shape)}; it must be {tuple(shape)}")


def last_places(padding_mask: Tensor) -> Tensor:
    """Return the place of the last token in each row of a mask (..., S), True at padding; 0 where there is none."""
    places = torch.arange(padding_mask.shape[-1], device=padding_mask.device)
    return places.masked_fill(padding_mask, 0).amax(dim=-1)


def _count(tokens: Tensor, padding: Tensor | None) -> int:
    return tokens.numel() if padding is None else int((~padding).sum())
