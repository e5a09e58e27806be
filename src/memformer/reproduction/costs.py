"""Table 3 and Figure 5 of the paper: cost of training by method and horizon, and of models by length and memory."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memformer.errors import InputError
from memformer.evaluation.flops import flops_per_token
from memformer.evaluation.plots import make_doubling, make_logarithmic, make_panels, put_legend_below
from memformer.models import build_model
from memformer.models.loading import MODELS
from memformer.reproduction.measure import MethodSpec, Setting, measure_growth, measure_seconds
from memformer.utils.checks import refuse_unknown_keys
from memformer.utils.machine import versions
from memformer.utils.tables import markdown_table
from memformer.utils.yaml_files import read_yaml

COSTS_FILE = "costs.yaml"
METHODS = (MethodSpec("bptt"), MethodSpec("checkpoint"), MethodSpec("replay"))
# Config key of the memory size, per model type.
MEMORY_SIZES = {"memformer": "num_slots", "transformer_xl": "memory_length"}

FULL_ATTENTION = "transformer (full attention)"


@dataclass(frozen=True, kw_only=True)
class CostsScale:
    """The measurements at one scale.

    Attributes:
        note: Note for readers of the results.
        models: Config of each model type.
        batch_size: Batch size of a measured update.
        horizons: Timesteps per update, for comparing the training methods of a Memformer.
        rounds: Timed updates per method; the methods alternate.
        lengths: Sequence lengths in tokens, for counting operations.
        memory_sizes: Memory sizes (slots or cached tokens), for measuring the device memory of an update.
    """

    note: str
    models: dict[str, dict[str, Any]]
    batch_size: int
    horizons: list[int] = field(default_factory=list)
    rounds: int = 5
    lengths: list[int] = field(default_factory=list)
    memory_sizes: list[int] = field(default_factory=list)


def costs_names(folder: Path) -> list[str]:
    """Return the names of the available measurements."""
    return sorted(file.parent.name for file in folder.glob(f"*/{COSTS_FILE}"))


def read_costs(folder: Path, scale: str) -> tuple[dict[str, Any], CostsScale]:
    """Return the title and the paper's results, by these names, and the measurements at one scale.

    Raises:
        InputError: The file in the folder is malformed or does not have this scale.
    """
    file = folder / COSTS_FILE
    given = read_yaml(file)
    refuse_unknown_keys(given, valid=("title", "paper", "scales"), owner=str(file))
    if scale not in given["scales"]:
        raise InputError(f"{folder.name} has no scale {scale!r}; it has {', '.join(given['scales'])}")
    refuse_unknown_keys(given["scales"][scale], valid=CostsScale.__dataclass_fields__, owner=f"{file}, scale {scale}")
    return given, CostsScale(**given["scales"][scale])


def measure_costs(folder: Path, scale: str, *, say: Callable[[str], None]) -> tuple[dict[str, Any], str, Figure]:
    """Measure the costs; return the results as JSON values, as Markdown and as a plot.

    Raises:
        InputError: The file in the folder is malformed or does not have this scale, or a measurement failed.
    """
    given, costs = read_costs(folder, scale)
    figures: dict[str, Any] = {"title": given["title"], "scale": scale, "note": costs.note, "versions": versions()}
    parts = [f"## {given['title']}, scale {scale}", costs.note.strip()]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = make_panels(figure, 2)
    left, right = (axes for _, axes in panels)
    if costs.horizons:
        figures["methods"] = _measure_methods(costs, say)
        parts.append(_methods_table(figures["methods"], given["paper"]))
        _draw_methods(figures["methods"], left, right)
    else:
        figures["operations"] = _count_operations(costs, say)
        figures["memory"] = _measure_memory(costs, say)
        parts.append(_table("tokens", "GFLOPs", figures["operations"], costs.lengths, unit=1e9))
        parts.append(_table("slots, or cached tokens", "MiB", figures["memory"], costs.memory_sizes, unit=2.0**20))
        parts.append(f"The paper: {given['paper'].strip()}")
        _draw(left, figures["operations"], costs.lengths, unit=1e9, x="tokens", y="GFLOPs")
        _draw(right, figures["memory"], costs.memory_sizes, unit=2.0**20, x="slots, or cached tokens", y="MiB")
        make_logarithmic(left, "y")
    for panel, _ in panels:
        put_legend_below(panel)
    figure.suptitle(f"{given['title']}, scale {scale} (ours)")
    return figures, "\n\n".join(parts) + "\n", figure


def _measure_methods(costs: CostsScale, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return speed and memory of every method at every horizon, and the ratios to BPTT."""
    rows = []
    for horizon in costs.horizons:
        say(f"{horizon} timesteps")
        setting = Setting(
            model_type="memformer",
            model=costs.models["memformer"],
            batch_size=costs.batch_size,
            num_timesteps=horizon,
        )
        seconds = measure_seconds(setting, METHODS, rounds=costs.rounds)
        growth = {method_spec: measure_growth(setting, method_spec) for method_spec in METHODS}
        for method_spec in METHODS:
            ratios = [bptt / own for bptt, own in zip(seconds[METHODS[0]], seconds[method_spec], strict=True)]
            rows.append(
                {
                    "horizon": horizon,
                    "method": method_spec.method,
                    "seconds": statistics.median(seconds[method_spec]),
                    "speed_ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
                    "memory_growth_bytes": growth[method_spec],
                    # A tiny model may need no page of memory more.
                    "memory_ratio": growth[method_spec] / growth[METHODS[0]] if growth[METHODS[0]] else None,
                }
            )
    return rows


def _methods_table(rows: list[dict[str, Any]], paper: dict[str, dict[str, float]]) -> str:
    lines = [
        [
            "timesteps",
            "method",
            "speed relative to BPTT (min - max over rounds)",
            "memory growth MiB",
            "relative to BPTT",
            "paper (12 layers, d 512, horizon 4): speed",
            "paper: MB",
        ]
    ]
    for row in rows:
        ratio, published = row["speed_ratio"], paper[row["method"]]
        memory_ratio = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        lines.append(
            [
                str(row["horizon"]),
                row["method"],
                f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})",
                f"{row['memory_growth_bytes'] / 2**20:,.0f}",
                memory_ratio,
                f"{published['speed']:.2f}",
                f"{published['memory_mb']:,.0f}",
            ]
        )
    return markdown_table(lines)


def _count_operations(costs: CostsScale, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the number of floating-point operations per sequence, for every model and sequence length."""
    found: dict[str, list[float]] = {FULL_ATTENTION: []}
    for length in costs.lengths:
        say(f"counting operations of a Transformer over {length:,} tokens")
        found[FULL_ATTENTION].append(length * flops_of(*transformer_over(costs, length)))
    for model_type, model in costs.models.items():
        each = flops_of(model_type, model)
        found[model_type] = [length * each for length in costs.lengths]
    return found


def transformer_over(costs: CostsScale, length: int) -> tuple[str, dict[str, Any]]:
    """Return the model type and config of a Transformer that attends to a whole sequence of this length."""
    return "transformer_xl", {**costs.models["transformer_xl"], "memory_length": 0, "segment_length": length}


def flops_of(model_type: str, model: dict[str, Any], *, device: str = "cpu") -> float:
    """Return the floating-point operations per token of a model, counted on a device.

    Raises:
        InputError: The config is invalid.
    """
    return flops_per_token(build_model(MODELS[model_type].config_class.from_dict(model)).to(device))


def memory_setting(costs: CostsScale, model_type: str, memory_size: int) -> Setting:
    """Return the update of one segment by a model with this memory size, whose device memory is measured."""
    return Setting(
        model_type=model_type,
        model={**costs.models[model_type], MEMORY_SIZES[model_type]: memory_size},
        batch_size=costs.batch_size,
        num_timesteps=1,
    )


def _measure_memory(costs: CostsScale, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the device memory in bytes used by an update of one segment, for every model and memory size."""
    found: dict[str, list[float]] = {}
    for model_type in costs.models:
        found[model_type] = []
        for size in costs.memory_sizes:
            say(f"measuring the memory of a {model_type} with {MEMORY_SIZES[model_type]} {size:,}")
            setting = memory_setting(costs, model_type, size)
            found[model_type].append(float(measure_growth(setting, MethodSpec("replay"))))
    return found


def _table(first: str, unit_name: str, figures: dict[str, list[float]], xs: list[int], *, unit: float) -> str:
    header = [first, *(f"{name}, {unit_name}" for name in figures)]
    lines = [[f"{x:,}", *(f"{values[n] / unit:,.3g}" for values in figures.values())] for n, x in enumerate(xs)]
    return markdown_table([header, *lines])


def _draw(axes: Axes, figures: dict[str, list[float]], xs: list[int], *, unit: float, x: str, y: str) -> None:
    for name, values in figures.items():
        axes.plot(xs, [value / unit for value in values], marker="o", label=name)
    make_doubling(axes, xs)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _draw_methods(rows: list[dict[str, Any]], speed: Axes, memory: Axes) -> None:
    for method, _ in METHODS:
        own = [row for row in rows if row["method"] == method]
        horizons = [row["horizon"] for row in own]
        speed.plot(horizons, [row["speed_ratio"]["median"] for row in own], marker="o", label=method)
        memory.plot(horizons, [row["memory_growth_bytes"] / 2**20 for row in own], marker="o", label=method)
    for axes, label in ((speed, "speed relative to BPTT"), (memory, "memory growth, MiB")):
        make_doubling(axes, sorted({row["horizon"] for row in rows}))
        axes.set_xlabel("timesteps per update")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
