"""Results of the headline comparison: what each model costs, and Memformers beside Transformer-XL at equal quality."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memformer.evaluation.plots import make_logarithmic, put_legend_below
from memformer.reproduction.headline import COSTS, Cost, Headline, Measured, Part
from memformer.reproduction.inference import Workload
from memformer.reproduction.results import deviation, highest_shown
from memformer.reproduction.trade_off import Crossing, Point, find_crossing
from memformer.utils.machine import versions
from memformer.utils.tables import markdown_table


class _Words(NamedTuple):
    """How a cost is written: its name with its unit, the unit, and the words for a lower and a higher cost."""

    name: str
    unit: float
    lower: str
    higher: str


_WORDS: dict[Cost, _Words] = {
    "state_bytes": _Words("state of a stream, KiB", 1024, "less", "more"),
    "memory_growth_bytes": _Words("memory growth, MiB", 2**20, "less", "more"),
    "evaluation_seconds": _Words("evaluation, µs a token", 1e-6, "faster", "slower"),
    "generation_seconds": _Words("generation, µs a token", 1e-6, "faster", "slower"),
    "flops": _Words("operations, MFLOPs a token", 1e6, "fewer", "more"),
}
_DRAWN: tuple[Cost, ...] = ("state_bytes", "evaluation_seconds", "generation_seconds")
_PLACES = {
    "better than every point": "better than every Transformer-XL",
    "worse than every point": "worse than every Transformer-XL",
    "the cheapest point is better": "worse than the cheapest Transformer-XL",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A Memformer beside the curve of the Transformer-XLs, by one cost.

    Attributes:
        own: The Memformer's cost.
        lowest: The lowest cost of a Transformer-XL.
        crossing: Where its quality lies on the curve, both as means over the seeds that all of these rows have.
        by_seed: The same for each of these seeds.
    """

    own: float
    lowest: float
    crossing: Crossing
    by_seed: dict[int, Crossing]

    def ratio(self, crossing: Crossing) -> float | None:
        """Return the cost of a Transformer-XL of equal quality, divided by the Memformer's; None: there is none."""
        return None if crossing.cost is None else crossing.cost / self.own

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        every = {"mean": self.crossing, **{str(seed): crossing for seed, crossing in self.by_seed.items()}}
        values = {
            name: {"place": each.place, "transformer_xl": each.cost, "ratio": self.ratio(each)}
            for name, each in every.items()
        }
        return {**values.pop("mean"), "ratio_of_the_cheapest": self.lowest / self.own, "by_seed": values}


def compare(row: Measured, curve: Sequence[Measured], cost: Cost) -> Comparison | None:
    """Return a Memformer beside Transformer-XLs, by the seeds that all of them have.

    None: there is no Transformer-XL or no such seed, or a cost is too small to be measured.
    """
    costs = [each.cost(cost) for each in (row, *curve)]
    shared = [seed for seed in row.bits if all(seed in each.bits for each in curve)]
    if not curve or not shared or min(costs) <= 0:
        return None

    def crossing(quality: float, qualities: Sequence[float]) -> Crossing:
        return find_crossing(quality, [Point(*pair) for pair in zip(costs[1:], qualities, strict=True)])

    return Comparison(
        own=costs[0],
        lowest=min(costs[1:]),
        crossing=crossing(_mean(row, shared), [_mean(each, shared) for each in curve]),
        by_seed={seed: crossing(row.bits[seed], [each.bits[seed] for each in curve]) for seed in shared},
    )


def compare_all(rows: Sequence[Measured]) -> list[tuple[Measured, dict[Cost, Comparison | None]]]:
    """Return every Memformer of a part with its comparison by every cost."""
    curve = [row for row in rows if row.group == "transformer_xl"]
    return [
        (row, {cost: compare(row, curve, cost) for cost in COSTS}) for row in rows if row.group == "memformer" and curve
    ]


def headline_json(
    headline: Headline, measured: Sequence[Sequence[Measured]], workloads: Sequence[Workload]
) -> dict[str, Any]:
    """Return the results and settings as JSON values, of the rows of each part and what they read."""
    return {
        "table": headline.key,
        "title": headline.title,
        "scale": headline.scale,
        "note": headline.note,
        "paper": {"text": headline.paper, "ratios": headline.paper_ratios},
        "versions": versions(),
        "parts": [_part_json(*part) for part in zip(headline.parts, measured, workloads, strict=True)],
    }


def _part_json(part: Part, rows: Sequence[Measured], workload: Workload) -> dict[str, Any]:
    return {
        "title": part.title,
        "table": part.table.key,
        "scale": part.scale,
        **asdict(workload),
        "unit": rows[0].unit if rows else None,
        "rows": [_row_json(row) for row in rows],
        "pairs": [
            {
                "row": row.figures.row.key,
                "label": row.label,
                **{cost: None if found is None else found.to_dict() for cost, found in comparisons.items()},
            }
            for row, comparisons in compare_all(rows)
        ],
    }


def _row_json(row: Measured) -> dict[str, Any]:
    bits = list(row.bits.values())
    return {
        "row": row.figures.row.key,
        "label": row.label,
        "group": row.group,
        "model_type": row.figures.row.model_type,
        "parameters": row.figures.parameters,
        "bits": {"mean": _mean(row), "deviation": deviation(bits), "by_seed": row.bits},
        **{cost: row.cost(cost) for cost in COSTS},
        "rounds": row.times._asdict(),
    }


def headline_markdown(headline: Headline, measured: Sequence[Sequence[Measured]]) -> str:
    """Return the tables of every part as Markdown: all models, and the Memformers at equal quality."""
    parts = [f"## {headline.title}, scale {headline.scale}", headline.note.strip(), f"The paper: {headline.paper}"]
    for part, rows in zip(headline.parts, measured, strict=True):
        if rows:
            parts += [f"### {part.title}", _rows_table(part, rows), *_pairs_table(headline, rows)]
    return "\n\n".join(parts) + "\n"


def _rows_table(part: Part, rows: Sequence[Measured]) -> str:
    columns = {cost: words.name for cost, words in _WORDS.items()}
    columns["memory_growth_bytes"] += f" ({part.streams:,} streams)"
    header = ["model", f"bits per {rows[0].unit} (mean ± deviation)", "seeds", "parameters", *columns.values()]
    lines = [header]
    for row in rows:
        cells = [row.label, _with_deviation(row), f"{len(row.bits)}", f"{row.figures.parameters:,}"]
        lines.append([*cells, *(_cost_cell(row, cost) for cost in COSTS)])
    return markdown_table(lines)


def _with_deviation(row: Measured) -> str:
    spread = f" ± {deviation(list(row.bits.values())):.4f}" if len(row.bits) > 1 else ""
    return f"{_mean(row):.4f}{spread}"


def _cost_cell(row: Measured, cost: Cost) -> str:
    unit = _WORDS[cost].unit
    spreads = {"evaluation_seconds": row.times.evaluation, "generation_seconds": row.times.generation}
    rounds = (
        f" ({_number(min(spreads[cost]) / unit)} - {_number(max(spreads[cost]) / unit)})" if cost in spreads else ""
    )
    return f"{_number(row.cost(cost) / unit)}{rounds}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _pairs_table(headline: Headline, rows: Sequence[Measured]) -> list[str]:
    pairs = compare_all(rows)
    if not pairs:
        return []
    header = ["beside a Transformer-XL of equal quality", *(_WORDS[cost].name.split(",")[0] for cost in COSTS)]
    lines = [header]
    lines += [[row.label, *(_pair_cell(found[cost], _WORDS[cost]) for cost in COSTS)] for row, found in pairs]
    published = {cost: headline.paper_ratios[cost] for cost in COSTS if cost in headline.paper_ratios}
    lines.append(
        ["the paper's claim", *(_times(published[cost], _WORDS[cost]) if cost in published else "" for cost in COSTS)]
    )
    return [markdown_table(lines)]


def _pair_cell(found: Comparison | None, words: _Words) -> str:
    if found is None:
        return "-"
    cell = _crossing_text(found, found.crossing, words)
    seeds = [_crossing_text(found, crossing, words) for crossing in found.by_seed.values()]
    if found.crossing.cost is None and found.crossing.place != "better than every point":
        cell = f"{cell}, {_times(found.lowest / found.own, words)} than the cheapest"
    is_same = all(crossing == found.crossing for crossing in found.by_seed.values())
    return cell if is_same else f"{cell} (by seed: {'; '.join(seeds)})"


def _crossing_text(found: Comparison, crossing: Crossing, words: _Words) -> str:
    ratio = found.ratio(crossing)
    return _PLACES[crossing.place] if ratio is None else _times(ratio, words)


def _times(ratio: float, words: _Words) -> str:
    return f"{ratio:.2f} times {words.lower}" if ratio >= 1 else f"{1 / ratio:.2f} times {words.higher}"


def draw_headline(headline: Headline, measured: Sequence[Sequence[Measured]]) -> Figure:
    """Return plots of quality against the state's size and against time, one line of plots for each part."""
    shown = [(part, rows) for part, rows in zip(headline.parts, measured, strict=True) if rows]
    figure = Figure(figsize=(14, 5.5 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(len(shown), 1)
    for number, (part, rows) in enumerate(shown):
        panel = figure.add_subfigure(grid[number, 0])
        for axes, cost in zip(panel.subplots(1, len(_DRAWN)), _DRAWN, strict=True):
            _draw(axes, rows, cost, is_first=cost == _DRAWN[0])
        panel.suptitle(f"{part.title} (ours; bars: deviation over seeds)")
        put_legend_below(panel)
    return figure


def _draw(axes: Axes, rows: Sequence[Measured], cost: Cost, *, is_first: bool) -> None:
    """Draw the rows; those that are far worse than most stand at the upper edge, as triangles."""
    words = _WORDS[cost]
    highest = highest_shown([_mean(row) for row in rows])
    curve = sorted((row for row in rows if row.group == "transformer_xl"), key=lambda row: row.cost(cost))
    groups = [(curve, "o-", "Transformer-XL, every memory length")] if curve else []
    groups += [([row], "*" if row.group == "memformer" else "s", row.label) for row in rows if row not in curve]
    for group, style, label in groups:
        if min(map(_mean, group)) > highest:
            costs = [row.cost(cost) / words.unit for row in group]
            note = f"{label}: {_mean(group[0]):.4f}, above the axis"
            axes.errorbar(costs, [highest] * len(costs), fmt="^", clip_on=False, label=note if is_first else None)
            continue
        axes.errorbar(
            [row.cost(cost) / words.unit for row in group],
            [_mean(row) for row in group],
            yerr=[deviation(list(row.bits.values())) for row in group],
            fmt=style,
            markersize=12 if style == "*" else 6,
            capsize=3,
            label=label if is_first else None,
        )
    axes.set_ylim(top=min(highest, axes.get_ylim()[1]))
    make_logarithmic(axes, "x")
    axes.set_xlabel(words.name)
    axes.set_ylabel(f"bits per {rows[0].unit}")
    axes.grid(alpha=0.3)


def _mean(row: Measured, seeds: Sequence[int] | None = None) -> float:
    return statistics.mean(row.bits[seed] for seed in (row.bits if seeds is None else seeds))
