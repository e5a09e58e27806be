"""Results of a table: our numbers from the finished runs, with the paper's numbers in separate columns."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memformer.evaluation.flops import flops_per_token
from memformer.evaluation.plots import make_doubling, make_logarithmic
from memformer.models import load_model
from memformer.reproduction.runs import TableRun
from memformer.reproduction.tables import Row, ScaleConfig, Table
from memformer.training.run_folder import BEST
from memformer.utils.machine import versions
from memformer.utils.tables import markdown_table

LABELS = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "bits_per_token": "bits per token"}


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """The results of one row's finished runs.

    Attributes:
        row: The row.
        parameters: Number of parameters.
        flops: Floating-point operations for a sequence of `flops_tokens` tokens.
        results: For each seed, the evaluation of the best weights on all held-out data.
    """

    row: Row
    parameters: int
    flops: float
    results: dict[int, dict[str, Any]]

    def values(self, metric: str, *, memory: str = "with_memory") -> list[float]:
        """Return a metric for every seed."""
        return [result[memory][metric] for result in self.results.values()]

    def to_dict(self, metric: str) -> dict[str, Any]:
        """Return the results as JSON values."""
        values = self.values(metric)
        return {
            "row": self.row.key,
            "name": self.row.name,
            "model_type": self.row.model_type,
            "parameters": self.parameters,
            "flops": self.flops,
            metric: {"mean": statistics.mean(values), "deviation": deviation(values), "seeds": len(values)},
            "results": self.results,
            "paper": self.row.paper,
        }


def collect(runs: Sequence[TableRun], scale: ScaleConfig) -> list[RowFigures]:
    """Return the results of all rows with a finished run.

    Raises:
        CheckpointError: A file of a run is missing or damaged.
    """
    rows = {run.row.key: run.row for run in sorted(runs, key=lambda run: run.row.key) if run.is_finished}
    found = []
    for key, row in rows.items():
        finished = [run for run in runs if run.row.key == key and run.is_finished]
        model = load_model(finished[0].folder / BEST)
        found.append(
            RowFigures(
                row=row,
                parameters=model.num_parameters,
                flops=flops_per_token(model) * scale.flops_tokens,
                results={run.seed: run.result(scale.metric) for run in finished},
            )
        )
    return found


def to_json(table: Table, rows: Sequence[RowFigures], scale: str) -> dict[str, Any]:
    """Return the results and settings of a table as JSON values."""
    return {
        "table": table.key,
        "title": table.title,
        "scale": scale,
        "metric": table.scale(scale).metric,
        "note": table.scale(scale).note,
        "flops_tokens": table.scale(scale).flops_tokens,
        "versions": versions(),
        "rows": [row.to_dict(table.scale(scale).metric) for row in rows],
    }


def to_markdown(table: Table, rows: Sequence[RowFigures], scale: str) -> str:
    """Return the table as Markdown, with our results on the left and the paper's on the right."""
    shared = table.scale(scale)
    label = LABELS[shared.metric]
    papers = sorted({name for row in rows for name in row.row.paper})
    header = [
        "model",
        f"{label} (mean ± deviation)",
        "seeds",
        "memory erased",
        "parameters",
        f"GFLOPs ({shared.flops_tokens:,} tokens)",
        "tokens trained",
        "minutes",
        *(f"paper: {name}" for name in papers),
    ]
    lines = [header]
    for row in rows:
        values = row.values(shared.metric)
        erased = statistics.mean(row.values(shared.metric, memory="memory_erased"))
        results = row.results.values()
        lines.append(
            [
                row.row.name,
                f"{statistics.mean(values):.4f}" + (f" ± {deviation(values):.4f}" if len(values) > 1 else ""),
                f"{len(values)}",
                f"{erased:.4f}",
                f"{row.parameters:,}",
                f"{row.flops / 1e9:.3g}",
                f"{statistics.mean(result['tokens_trained'] for result in results):,.0f}",
                f"{statistics.mean(result['training_seconds'] for result in results) / 60:.1f}",
                *(f"{row.row.paper[name]:g}" if name in row.row.paper else "" for name in papers),
            ]
        )
    return f"## {table.title}, scale {scale}\n\n{shared.note.strip()}\n\n{markdown_table(lines)}\n"


def draw(table: Table, rows: Sequence[RowFigures], scale: str) -> Figure:
    """Return plots of the table's metric: against the operations per sequence, and along every curve.

    Rows have the numbers with which their keys begin. Those that are far worse than most stand at the upper edge, as
    triangles.
    """
    shared = table.scale(scale)
    highest = highest_shown([statistics.mean(row.values(shared.metric)) for row in rows])
    curves = sorted({name for row in rows for name in row.row.curves})
    figure = Figure(figsize=(11 + 5 * len(curves), 5 + 0.1 * len(rows)), layout="constrained")
    axes, *others = figure.subplots(1, 1 + len(curves), squeeze=False)[0]
    colors = {kind: f"C{index}" for index, kind in enumerate(sorted({row.row.model_type for row in rows}))}
    for row in rows:
        number = row.row.key.partition("-")[0].lstrip("0")
        operations, mean = row.flops / 1e9, statistics.mean(row.values(shared.metric))
        color, label = colors[row.row.model_type], f"{number} {row.row.name}"
        if mean > highest:
            note = f"{label}: {mean:.4f}, above the axis"
            axes.errorbar([operations], [highest], fmt="^", color=color, clip_on=False, label=note)
        else:
            _draw_points(axes, [(operations, row)], shared.metric, style="o", color=color, label=label)
        position, below = (operations, min(mean, highest)), mean > highest
        axes.annotate(number, position, xytext=(4, -9 if below else 4), textcoords="offset points", fontsize=8)
    axes.set_ylim(top=min(highest, axes.get_ylim()[1]))
    make_logarithmic(axes, "x")
    axes.set_xlabel(f"GFLOPs for {shared.flops_tokens:,} tokens")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for name, own_axes in zip(curves, others, strict=True):
        points = sorted(
            ((float(row.row.curves[name]), row) for row in rows if name in row.row.curves), key=lambda pair: pair[0]
        )
        _draw_points(own_axes, points, shared.metric, style="o-", color="C0")
        make_doubling(own_axes, [int(x) for x, _ in points])
        own_axes.set_xlabel(name)
    for each in (axes, *others):
        each.set_ylabel(LABELS[shared.metric])
        each.grid(alpha=0.3)
    axes.set_title(f"{table.title}, scale {scale} (ours; bars: deviation over seeds)", loc="left")
    return figure


def _draw_points(
    axes: Axes,
    points: Sequence[tuple[float, RowFigures]],
    metric: str,
    *,
    style: str,
    color: str,
    label: str | None = None,
) -> None:
    means = [statistics.mean(row.values(metric)) for _, row in points]
    spreads = [deviation(row.values(metric)) for _, row in points]
    axes.errorbar([x for x, _ in points], means, yerr=spreads, fmt=style, color=color, capsize=3, label=label)


def highest_shown(means: Sequence[float]) -> float:
    """Return the upper end of an axis on which most rows can be told apart; infinity if all of them fit."""
    best, median = min(means), statistics.median(means)
    end = best + 6 * (median - best)
    return end if best < median and end < max(means) else math.inf


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
