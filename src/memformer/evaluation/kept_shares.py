"""How much of itself each slot of the memory keeps while a model reads: one number per slot and timestep."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from memformer.errors import InputError
from memformer.evaluation.inspection import check_can_inspect, kept_share
from memformer.evaluation.plots import arrange_panels, use_whole_numbers
from memformer.models.recurrence import reading
from memformer.nn.attention import AttentionRecord
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, check_integer

_COLORS = "viridis"


@dataclass(frozen=True)
class KeptShares:
    """Shares that the slots keep of themselves; see `InspectedTimestep.kept`.

    Attributes:
        shares: (N, K) share of itself, 0 to 1, that each slot keeps at each timestep.
        starts: Timesteps at which a document begins.
        description: What was read, as a noun.
    """

    shares: NDArray[np.float64]
    starts: list[int]
    description: str


def read_kept_shares(
    model: nn.Module, stream: Iterable[Rollout], *, max_timesteps: Integer, description: str
) -> KeptShares:
    """Return what each slot keeps of itself while a model reads the first timesteps of a stream.

    The model's mode is left unchanged. The readout is not computed, so this costs one encoding of each segment.

    Args:
        model: A model with slots; see `check_can_inspect`.
        stream: Rollouts of one row.
        max_timesteps: Largest number of timesteps to read.
        description: What the stream is, as a noun.

    Raises:
        InputError: The model has no slots, a rollout has several rows, or the stream has no timestep.
    """
    inner, most = check_can_inspect(model), check_integer("max_timesteps", max_timesteps, 1)
    shares: list[NDArray[Any]] = []
    starts = []
    with reading(inner):
        memory = inner.initial_memory(1)
        for rollout in map(inner.align_inputs, stream):
            if rollout.batch_size != 1:
                raise InputError(f"a rollout has {rollout.batch_size} rows; the stream must have 1")
            on_device = rollout.to(inner.device)
            for index in range(min(rollout.num_timesteps, most - len(shares))):
                if not shares or (rollout.reset is not None and rollout.reset[index, 0]):
                    starts.append(len(shares))
                    memory = inner.initial_memory(1)
                padding = None if on_device.input_padding is None else on_device.input_padding[index]
                record = AttentionRecord()
                _, memory = inner.encode(on_device.inputs[index], memory=memory, padding_mask=padding, attention=record)
                shares.append(kept_share(record).cpu().numpy())
            if len(shares) == most:
                break
    if not shares:
        raise InputError("the stream has no timestep; at least 1 is needed")
    return KeptShares(np.stack(shares), starts, description)


def draw_kept_shares(kept: KeptShares) -> Figure:
    """Return a picture of slots (rows) by timesteps (columns); a white line marks the beginning of a document."""
    num_timesteps, num_slots = kept.shares.shape
    figure = Figure(figsize=(8, min(4.0, 1.2 + 0.1 * num_slots)))
    axes = figure.subplots()
    box = (-0.5, num_timesteps - 0.5, num_slots - 0.5, -0.5)
    axes.imshow(
        kept.shares.T, cmap=_COLORS, vmin=0, vmax=1, aspect="auto", interpolation="none", origin="upper", extent=box
    )
    for start in kept.starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    axes.set_xlabel("timestep")
    axes.set_ylabel("slot")
    for axis in (axes.xaxis, axes.yaxis):
        use_whole_numbers(axis)
    arrange_panels(figure, right=1.2)
    place, width = axes.get_position(), figure.get_figwidth()
    scale = figure.add_axes((place.x1 + 0.15 / width, place.y0, 0.15 / width, place.height))
    scale.imshow(np.linspace(1, 0, 64)[:, None], cmap=_COLORS, aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    scale.set_xticks([])
    scale.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.set_ylabel("share kept", labelpad=8)
    return figure
