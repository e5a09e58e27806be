"""Plots of recall and retention, and helpers for all plots: legends beside the data, axes with plain numbers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from memformer.evaluation.document_retention import DocumentRetention
from memformer.evaluation.recall import Recall
from memformer.utils.files import atomic_write
from memformer.utils.words import counted

# Of fixed margins: characters of the legend per inch of width, and the height of a line of text in inches.
_CHARACTERS_PER_INCH = 12
_LINE = 0.22
_NO_METADATA: dict[str, str | None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw_recall(recall: Recall, *, trained_distance: int, segment_length: int) -> Figure:
    """Return a plot of accuracy against distance.

    Args:
        recall: The measured recall.
        trained_distance: Longest distance in training, in segments.
        segment_length: Tokens of a segment.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    distances = [point.distance for point in recall.points]
    axes.plot(distances, [point.accuracy for point in recall.points], "o-", ms=4, label="with memory")
    erased = [point.accuracy_memory_erased for point in recall.points]
    axes.plot(distances, erased, "s--", ms=4, color="C1", label="memory erased")
    axes.axvline(
        trained_distance, color="0.5", linestyle="--", label=f"longest distance in training ({trained_distance:,})"
    )
    axes.set_xscale("log", base=2)
    _label_powers_of_two(axes, max(*distances, trained_distance))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"segments of {segment_length:,} tokens from the last fact to the question")
    axes.set_ylabel("accuracy")
    axes.set_title(f"recall of {counted(recall.num_facts, 'fact')}")
    axes.grid(alpha=0.3)
    put_legend_below(figure)
    return figure


def draw_documents(result: DocumentRetention) -> Figure:
    """Return two plots: bits per token by position, and bits per byte by the age of the memory."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    (left, by_position), (right, by_delay) = make_panels(figure, 2)

    # Bucket edges double, so equally spaced buckets form a logarithmic axis that includes position 0.
    labels = [bucket.label for bucket in result.buckets]
    indices = range(len(labels))
    by_position.plot(indices, [bucket.bits_per_token for bucket in result.buckets], "o-", ms=4, label="with memory")
    by_position.plot(
        indices, [bucket.bits_per_token_memory_erased for bucket in result.buckets], "s--", ms=4, label="memory erased"
    )
    by_position.set_xticks(indices, labels, rotation=45, ha="right")
    by_position.set_xlabel(f"position in the document (segments of {result.segment_length:,} tokens)")
    by_position.set_ylabel("bits per token")
    by_position.set_title(f"{result.num_tokens:,} held-out tokens")

    delays = list(result.delayed_nll)
    by_delay.plot(delays, [result.bits_per_byte(delay) for delay in delays], "o-", ms=4, label="memory of this age")
    by_delay.axhline(result.bits_per_byte(None), color="C1", linestyle="--", label="memory erased")
    # Logarithmic from 1 on; 0 is as far from 1 as 2 is.
    by_delay.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    by_delay.set_xlim(-0.3, 1.2 * max(1, delays[-1]))
    by_delay.set_xticks(delays, [f"{delay:,}" for delay in delays])
    by_delay.set_xticks([], minor=True)
    by_delay.set_xlabel(f"age of the memory (segments of {result.segment_length:,} tokens)")
    by_delay.set_ylabel(f"bits per {result.unit}")
    by_delay.set_title(f"{result.num_delayed_tokens:,} tokens from position {delays[-1]} on")

    for part, axes in ((left, by_position), (right, by_delay)):
        axes.grid(alpha=0.3)
        put_legend_below(part)
    return figure


def make_panels(figure: Figure, count: int) -> list[tuple[SubFigure, Axes]]:
    """Return panels side by side, each with axes and room for a legend of its own."""
    grid = figure.add_gridspec(1, count)
    parts = [figure.add_subfigure(grid[0, column]) for column in range(count)]
    return [(part, part.subplots()) for part in parts]


def put_legend_below(figure: Figure | SubFigure) -> None:
    """Add a legend of all axes below them, where it covers no data; the figure needs the constrained layout."""
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    columns = _columns_of(labels, width=figure.bbox.width / figure.dpi)
    figure.legend(loc="outside lower center", ncols=min(columns, 3), frameon=False)


def _columns_of(labels: Sequence[str], *, width: float) -> int:
    """Return the number of columns of a legend of this width in inches."""
    return max(1, int(width * _CHARACTERS_PER_INCH) // (max(map(len, labels), default=0) + 8))


def arrange_panels(figure: Figure, *, right: float = 0.15) -> None:
    """Give a figure of panels below each other fixed margins, and a legend of all axes below them if there are labels.

    It is faster than the constrained layout, which measures every text several times. The figure becomes higher by the
    rows of the legend. Long labels of the legend are cut in front.

    Args:
        figure: The figure. Its tick labels have at most 7 characters.
        right: Margin on the right in inches.
    """
    width, height = figure.get_size_inches()
    parts = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = [handle for part, _ in parts for handle in part]
    labels = [_cut_in_front(label, int(width * _CHARACTERS_PER_INCH) - 8) for _, part in parts for label in part]
    columns = _columns_of(labels, width=width)
    rows = -(-len(labels) // columns)
    height += rows * _LINE
    figure.set_size_inches(width, height)
    bottom = 0.56 + rows * _LINE + (0.08 if rows else 0)
    figure.subplots_adjust(
        left=0.95 / width, right=1 - right / width, bottom=bottom / height, top=1 - 0.12 / height, hspace=0.08
    )
    for axes in figure.axes:
        place = axes.get_position()
        axes.xaxis.set_label_coords(0.5, -0.38 / (place.height * height))
        axes.yaxis.set_label_coords(-0.74 / (place.width * width), 0.5)
        axes.yaxis.label.set_verticalalignment("center")
    if labels:
        legend_top = (bottom - 0.54) / height
        figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, legend_top), ncols=columns, frameon=False
        )


def _cut_in_front(text: str, most: int) -> str:
    shown = text if len(text) <= most else f"…{text[1 - most :]}"
    return shown.replace("$", r"\$")  # which would begin a formula


def make_logarithmic(axes: Axes, name: Literal["x", "y"]) -> None:
    """Give the x or y axis a logarithmic scale with plain numbers (3.4, not 3.4 x 10^0); call it after plotting."""
    axes.set(**{f"{name}scale": "log"})
    axis: Axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(6))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def make_doubling(axes: Axes, xs: list[int]) -> None:
    """Give the x axis a logarithmic scale whose ticks are the measured numbers, which double."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.set_xticks([], minor=True)


def use_whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def use_plain_numbers(axis: Axis) -> None:
    """Label the ticks with plain numbers, without a common offset or factor."""
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page; its texts are texts, not outlines."""
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata=_NO_METADATA)
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration and doctype of a standalone file


def write_figure(file: Path, figure: Figure) -> None:
    """Write a figure as a PNG file.

    Raises:
        SaveError: Writing failed; see `atomic_write`.
    """
    atomic_write(file, lambda partial: figure.savefig(partial, format="png", dpi=150))


def _label_powers_of_two(axes: Axes, largest: int) -> None:
    powers = [1 << power for power in range(largest.bit_length() + 1)]
    # Many labels would overlap: then only every second one is kept, starting with 1.
    powers = powers[:: 1 + (len(powers) > 12)]
    axes.set_xticks(powers, [f"{power:,}" for power in powers])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.9, 1.1 * largest)
