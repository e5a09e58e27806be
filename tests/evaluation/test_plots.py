"""Plots: every axis has its own quantity and plain ticks, and no legend covers the data."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from memformer.evaluation.document_retention import DocumentRetention, PositionBucket
from memformer.evaluation.kept_shares import draw_kept_shares
from memformer.evaluation.plots import (
    draw_documents,
    draw_recall,
    make_doubling,
    make_logarithmic,
    make_panels,
    put_legend_below,
    to_svg,
)
from memformer.evaluation.recall import Recall, RecallPoint
from memformer.training.curves import draw_comparison, draw_run, metric_of
from tests.evaluation.test_kept_shares import shares_of

TEXT = {"data": {"train": {"kind": "text"}}}
WORDS = metric_of(TEXT)
PIXELS = metric_of({"data": {"train": {"kind": "digits"}, "recall": None}})
RECALL = metric_of({"data": {"train": {"kind": "text"}, "recall": {"task": "fact"}}})
RUNS_OF_ALL_KINDS = (("bits_per_byte", WORDS), ("bits_per_byte", PIXELS), ("accuracy", RECALL))


def log(key, *, bits_per_token=None):
    lines = [{"kind": "training", "update": update, "bits_per_token": 9.0 / update} for update in range(1, 5)]
    for update in (2, 4):
        line = {"kind": "evaluation", "update": update, key: 1 / update, f"{key}_memory_erased": 0.9}
        lines.append(line if bits_per_token is None else {**line, "bits_per_token": bits_per_token / update})
    return lines


def retention(unit="byte"):
    buckets = [
        PositionBucket(first_segment=first, last_segment=last, num_tokens=9, nll=9.0, nll_memory_erased=10.0)
        for first, last in ((0, 0), (1, 1), (2, 3))
    ]
    return DocumentRetention(
        num_documents=1,
        num_tokens=27,
        num_bytes=27,
        segment_length=8,
        buckets=buckets,
        num_delayed_tokens=9,
        delayed_nll={0: 8.0, 1: 9.0},
        delayed_nll_memory_erased=10.0,
        peak_memory_bytes=1,
        unit=unit,
    )


def recall(accuracy):
    points = [
        RecallPoint(
            distance=distance,
            num_tokens=9,
            num_questions=10,
            num_right=accuracy,
            num_right_memory_erased=10 - accuracy,
            peak_memory_bytes=1,
        )
        for distance in (1, 2, 4)
    ]
    return draw_recall(Recall(num_facts=1, points=points), trained_distance=2, segment_length=8)


FIGURES = {
    "a run on bytes": lambda: draw_run(log("bits_per_byte", bits_per_token=1.0), WORDS),
    "a run on words": lambda: draw_run(log("bits_per_byte", bits_per_token=5.0), WORDS),
    "a recall run": lambda: draw_run(log("accuracy"), RECALL),
    "a run without evaluation": lambda: draw_run(log("accuracy")[:4], WORDS),
    "two runs": lambda: draw_comparison([("a", log("bits_per_byte"), WORDS), ("b", log("accuracy"), RECALL)]),
    "documents": lambda: draw_documents(retention()),
    **{f"recall {accuracy}": lambda accuracy=accuracy: recall(accuracy) for accuracy in (0, 5, 10)},
}


@pytest.mark.parametrize("length", [5, 60, 90])
def test_a_legend_of_long_names_is_not_wider_than_its_figure(length):
    figure = Figure(figsize=(14, 5), layout="constrained")
    ((panel, axes),) = make_panels(figure, 1)
    for number in range(6):
        axes.plot([1, 2], [number, 2], label="x" * (length - 1) + str(number))
    put_legend_below(panel)
    FigureCanvasAgg(figure).draw()
    (legend,) = panel.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES.keys())
def test_a_legend_covers_no_axes(make):
    """The legend is beside the data, whatever the data is."""
    figure = make()
    FigureCanvasAgg(figure).draw()
    parts = [figure, *figure.subfigs]
    legends = [legend.get_window_extent() for part in parts for legend in part.legends]
    assert legends
    assert all(axes.get_legend() is None for axes in figure.axes)
    for legend in legends:
        assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


LONG = "/a folder/" + "of a run, " * 20
ARRANGED = {
    **{
        name: FIGURES[name] for name in ("a run on bytes", "a run on words", "a recall run", "a run without evaluation")
    },
    "runs with long names": lambda: draw_comparison(
        [(f"{LONG}{number}", log(key), metric) for number, (key, metric) in enumerate(RUNS_OF_ALL_KINDS)]
    ),
    "many runs": lambda: draw_comparison([(f"runs/{number}", log("accuracy"), RECALL) for number in range(30)]),
    "a wide range": lambda: draw_run([{"kind": "training", "update": 10**8, "bits_per_token": 1e-4}, *log("x")], WORDS),
    "one slot": lambda: draw_kept_shares(shares_of(1, 1)),
    "many slots": lambda: draw_kept_shares(shares_of(48, 1024)),
}


@pytest.mark.parametrize("make", ARRANGED.values(), ids=ARRANGED.keys())
def test_no_text_is_cut_and_none_covers_another(make):
    """Fixed margins have room for all texts: tick labels, axis labels and the legend."""
    figure = make()
    FigureCanvasAgg(figure).draw()
    texts = {}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() and artist.get_visible()):
        texts[text] = text.get_window_extent()
    ticks = {
        tick.label1 if axis.get_ticks_position() != "right" else tick.label2: axis
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not axis.get_view_interval().min() <= tick.get_loc() <= axis.get_view_interval().max()
    }
    boxes = [(text, box) for text, box in texts.items() if text not in ticks and box.width]
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)


def test_names_of_runs_are_drawn_as_they_are():
    """A dollar sign begins no formula, and no name is hidden."""
    figure = draw_comparison([(name, log("accuracy"), RECALL) for name in ("a$b$", "_hidden", "c<d>&")])
    svg = to_svg(figure)
    for shown in ("a$b$", "./_hidden", "c&lt;d&gt;&amp;"):
        assert f">{shown}</text>" in svg


def test_a_loss_that_falls_by_magnitudes_has_a_logarithmic_axis():
    assert [axes.get_yscale() for axes in draw_run(log("bits_per_byte", bits_per_token=5.0), WORDS).axes] == [
        "linear"
    ] * 2
    fallen = [{"kind": "training", "update": update, "bits_per_token": 8 / update**2} for update in range(1, 6)]
    assert [axes.get_yscale() for axes in draw_run([*fallen, *log("accuracy")], RECALL).axes] == ["log", "linear"]
    certain = [*fallen, {"kind": "training", "update": 6, "bits_per_token": 0.0}]
    assert [axes.get_yscale() for axes in draw_run([*certain, *log("accuracy")], RECALL).axes] == ["linear", "linear"]


def labels(figure):
    return [axes.get_ylabel() for axes in figure.axes]


def test_every_axis_has_its_own_quantity():
    """An accuracy is not drawn on an axis of bits, and pixels are not called bytes."""
    assert labels(FIGURES["a run on bytes"]()) == ["bits per byte"]
    assert labels(FIGURES["a run on words"]()) == ["bits per token", "bits per byte"]
    assert labels(draw_run(log("bits_per_byte", bits_per_token=1.0), PIXELS)) == ["bits per pixel"]
    figure = FIGURES["a recall run"]()
    assert labels(figure) == ["bits per token", "accuracy\n(mean over distances)"]
    assert figure.axes[1].get_ylim() == (-0.03, 1.03)
    assert [len(axes.lines) for axes in figure.axes] == [1, 2]
    assert labels(FIGURES["two runs"]()) == [
        "training, bits per token",
        "held out, bits per byte",
        "held out, accuracy\n(mean over distances)",
    ]
    assert labels(draw_documents(retention("pixel")))[1] == "bits per pixel"


def tick_labels(axis):
    FigureCanvasAgg(axis.figure).draw()
    low, high = axis.get_view_interval()
    labels = [label.get_text() for label, tick in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)]
    return [label for label, tick in zip(labels, axis.get_ticklocs(), strict=True) if low <= tick <= high]


def test_ticks_are_plain_numbers():
    """Logarithmic axes have plain numbers, and updates and segments whole ones."""
    for values, shown in (([3.1, 3.4, 3.9], "3.3"), ([2, 90], "20"), ([1, 5e4], "1,000")):
        axes = Figure().subplots()
        axes.plot(values, values)
        make_logarithmic(axes, "x")
        found = tick_labels(axes.xaxis)
        assert shown in found
        assert not any("mathdefault" in label or "times" in label for label in found)
    axes = Figure().subplots()
    axes.plot([1, 2, 1024], [1, 2, 3])
    make_doubling(axes, [1, 2, 1024])
    assert tick_labels(axes.xaxis) == ["1", "2", "1,024"]
    for name in ("a run on bytes", "two runs"):
        found = tick_labels(FIGURES[name]().axes[-1].xaxis)
        assert found == [str(round(float(label))) for label in found]
    assert np.all(np.array([float(label) for label in found]) >= 0)
