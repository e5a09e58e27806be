"""Steps that incremental decoding needs for every model: find the new tokens, and take each row's last value."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def new_tokens(
    inputs: Int64[Tensor, "B S"], *, num_new: list[int], num_read: list[int], padding_position: int
) -> tuple[Int64[Tensor, "B Q"], Int64[Tensor, "B Q"]]:
    """Return the inputs of each row that are not read yet, and their positions, on the CPU.

    Args:
        inputs: The inputs of each row, on the CPU; tokens behind them are not used.
        num_new: Number of inputs of each row that are not read yet.
        num_read: Number of those that are.
        padding_position: The position that marks padding, of rows with fewer new inputs than others.
    """
    tokens = torch.zeros((len(num_new), max(num_new)), dtype=torch.int64, device="cpu")
    positions = torch.full_like(tokens, padding_position)
    for row, (count, read) in enumerate(zip(num_new, num_read, strict=True)):
        tokens[row, :count] = inputs[row, read : read + count]
        positions[row, :count] = torch.arange(read, read + count, device="cpu")
    return tokens, positions


def last_of_each_row(
    values: Float[Tensor, "B Q W"], *, num_new: list[int], earlier: Float[Tensor, "B W"] | None
) -> Float[Tensor, "B W"]:
    """Return the value of each row's last new token; a row without new tokens keeps its `earlier` value."""
    if min(num_new) == values.shape[1]:
        return values[:, -1]
    last = torch.tensor([max(count - 1, 0) for count in num_new], device=values.device)
    latest = values[torch.arange(len(num_new), device=values.device), last]
    if earlier is None:
        return latest
    is_unchanged = torch.tensor([count == 0 for count in num_new], device=values.device)[:, None]
    return torch.where(is_unchanged, earlier, latest)
