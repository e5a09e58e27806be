"""HTML summary of a run: evaluation results, loss curve, memory gradients, a sample and the config."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from memformer.errors import CheckpointError, InputError
from memformer.evaluation.plots import put_legend_below, use_whole_numbers
from memformer.training.checkpoint import is_checkpoint_name
from memformer.training.curves import draw_run, metric_of
from memformer.training.logs import LOG_FILE, read_log
from memformer.training.run_folder import RESULT_FILE, SAMPLES, VERSIONS_FILE, read_run_config
from memformer.utils.files import read_json, user_path, write_text

SUMMARY_FILE = "summary.html"


def write_report(folder: str | Path) -> Path:
    """Write summary.html into a run folder and return its path; the page is self-contained.

    Raises:
        InputError: The folder does not contain a trained run.
        CheckpointError: A file of the run is damaged.
        SaveError: Writing failed.
    """
    folder = user_path(folder)
    if not (folder / LOG_FILE).is_file():
        raise InputError(f"{folder} has no {LOG_FILE}; a report needs a trained run")
    lines = read_log(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memformer.training"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    result = read_json(folder / RESULT_FILE) if (folder / RESULT_FILE).is_file() else None
    training = [line for line in lines if line["kind"] == "training"]
    config = read_run_config(folder)
    metric = metric_of(config)
    try:
        page = environment.get_template("summary.html.jinja").render(
            name=folder.resolve().name,
            folder=str(folder),
            curve=_as_svg(draw_run(lines, metric)),
            unit=metric.label,
            gradients=draw_gradients(training),
            result=result,
            last=training[-1] if training else None,
            sample=_newest_sample(folder / SAMPLES),
            config=yaml.safe_dump(config, sort_keys=False),
            versions=json.dumps(read_json(folder / VERSIONS_FILE), indent=2),
        )
    except (KeyError, jinja2.UndefinedError) as error:
        raise CheckpointError(f"{LOG_FILE} or {RESULT_FILE} in {folder} lacks a value: {error}") from error
    write_text(folder / SUMMARY_FILE, page)
    return folder / SUMMARY_FILE


def draw_gradients(training: list[dict[str, Any]]) -> str | None:
    """Return a plot of the memory gradient norm per timestep of a rollout as SVG; None if all norms are 0."""
    lines = [line for line in training if any(line.get("memory_gradient_norms", []))]
    if not lines:
        return None
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    shown = sorted({0, len(lines) // 2, len(lines) - 1})
    for index, grey in zip(shown, ("0.75", "0.5", "0.0")[-len(shown) :], strict=True):
        norms = lines[index]["memory_gradient_norms"]
        segments_before_end = range(len(norms), 0, -1)
        axes.plot(segments_before_end, norms, "o-", color=grey, ms=4, label=f"update {lines[index]['update']:,}")
    axes.invert_xaxis()
    use_whole_numbers(axes.xaxis)
    axes.set_yscale("log")
    axes.set_xlabel("segments before the end of the rollout")
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.3)
    put_legend_below(figure)
    return _as_svg(figure)


def _as_svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration and doctype of a standalone file


def _newest_sample(folder: Path) -> dict[str, str] | None:
    # Samples have the names of checkpoints; the user may keep other files beside them.
    samples = [file for file in folder.glob("*") if is_checkpoint_name(file.stem) and file.suffix in {".txt", ".png"}]
    files = sorted(samples)
    if not files:
        return None
    if files[-1].suffix == ".png":
        return {"image": base64.b64encode(files[-1].read_bytes()).decode("ascii")}
    return {"text": files[-1].read_text(encoding="utf-8")}
