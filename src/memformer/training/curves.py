"""Curves of runs over their updates: the training loss and the result on held-out data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memformer.data.sources import unit_of_kind
from memformer.evaluation.plots import arrange_panels, make_logarithmic, use_plain_numbers, use_whole_numbers

LogLines = Sequence[Mapping[str, Any]]

# A panel whose largest value is at least this many times its smallest has a logarithmic axis.
_LOGARITHMIC_FROM = 10


class Metric(NamedTuple):
    """A result on held-out data.

    Attributes:
        key: Key in the evaluation lines of a run's log.
        key_erased: Key of the same result with the memory erased.
        label: Name with its unit.
        is_better_if_higher: Whether the highest value is the best.
    """

    key: str
    key_erased: str
    label: str
    is_better_if_higher: bool


def metric_of(config: Mapping[str, Any]) -> Metric:
    """Return the held-out metric of a run: accuracy for a recall task, else bits per byte, or per pixel or value.

    Args:
        config: The run's config as plain values.
    """
    data = config.get("data") or {}
    if data.get("recall") is not None:
        return Metric("accuracy", "accuracy_memory_erased", "accuracy (mean over distances)", True)
    unit = unit_of_kind(str((data.get("train") or {}).get("kind")))
    return Metric("bits_per_byte", "bits_per_byte_memory_erased", f"bits per {unit}", False)


def draw_run(lines: LogLines, metric: Metric) -> Figure:
    """Return a plot of one run: training loss, and the held-out metric with the memory and with it erased.

    Both are drawn into one panel if they have the same unit: tokens are bytes, pixels or values.
    """
    evaluations = [line for line in lines if metric.key in line]
    is_same_unit = all(line.get("bits_per_token", line[metric.key]) == line[metric.key] for line in evaluations)
    is_same_unit &= not metric.is_better_if_higher
    figure = Figure(figsize=(8, 3.2) if is_same_unit else (8, 4.8))
    axes = figure.subplots(1 if is_same_unit else 2, 1, sharex=True, squeeze=False)[:, 0]
    plot_training(axes[0], lines, label="training", color="0.6")
    plot_held_out(axes[-1], lines, metric, metric.key, "o-", color="C0", label="held out, with memory")
    plot_held_out(axes[-1], lines, metric, metric.key_erased, "s--", color="C1", label="held out, memory erased")
    axes[0].set_ylabel(metric.label if is_same_unit and evaluations else "bits per token")
    finish(figure)
    return figure


def draw_comparison(runs: Sequence[tuple[str, LogLines, Metric]]) -> Figure:
    """Return a plot of several runs: the training loss, and one panel for each held-out metric.

    Args:
        runs: Name, log lines and metric of each run.
    """
    metrics = list(dict.fromkeys(metric for _, _, metric in runs))
    figure = Figure(figsize=(8, 2.6 * (1 + len(metrics))))
    axes = figure.subplots(1 + len(metrics), 1, sharex=True)
    for number, (name, lines, metric) in enumerate(runs):
        color = f"C{number % 10}"
        # Matplotlib hides labels that begin with an underscore.
        plot_training(axes[0], lines, label=f"./{name}" if name.startswith("_") else name, color=color)
        plot_held_out(axes[1 + metrics.index(metric)], lines, metric, metric.key, "o-", color=color, label=None)
    axes[0].set_ylabel("training, bits per token")
    for metric, own in zip(metrics, axes[1:], strict=True):
        own.set_ylabel(_in_lines(f"held out, {metric.label}"))
    finish(figure)
    return figure


def plot_training(axes: Axes, lines: LogLines, *, label: str, color: str) -> None:
    """Plot the training loss in bits per token."""
    training = [line for line in lines if line["kind"] == "training"]
    values = [line["bits_per_token"] for line in training]
    axes.plot([line["update"] for line in training], values, color=color, label=label)


def plot_held_out(
    axes: Axes, lines: LogLines, metric: Metric, key: str, style: str, *, color: str, label: str | None
) -> None:
    """Plot a held-out metric, if there are evaluations; an accuracy gets an axis from 0 to 1."""
    measured = [line for line in lines if key in line]
    if measured:
        updates = [line["update"] for line in measured]
        axes.plot(updates, [line[key] for line in measured], style, color=color, label=label, ms=4)
        axes.set_ylabel(_in_lines(metric.label))
    if metric.is_better_if_higher:
        axes.set_ylim(-0.03, 1.03)


def _in_lines(label: str) -> str:
    """Return a label with what is in brackets in a second line, so that it is not longer than a panel is high."""
    return label.replace(" (", "\n(")


def finish(figure: Figure) -> None:
    """Label the x axis with updates, choose the scales of the others, and add grids and the legend."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_autoscaley_on() and _spans_magnitudes(axes):
            make_logarithmic(axes, "y")
        else:
            use_plain_numbers(axes.yaxis)
    figure.axes[-1].set_xlabel("update")
    use_whole_numbers(figure.axes[-1].xaxis)
    arrange_panels(figure)


def _spans_magnitudes(axes: Axes) -> bool:
    values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
    return bool(values and min(values) > 0 and max(values) >= _LOGARITHMIC_FROM * min(values))
