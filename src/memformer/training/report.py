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
from memformer.training.checkpoint import is_checkpoint_name
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
    try:
        page = environment.get_template("summary.html.jinja").render(
            name=folder.resolve().name,
            folder=str(folder),
            curve=draw_curve(lines),
            gradients=draw_gradients(training),
            result=result,
            last=training[-1] if training else None,
            sample=_newest_sample(folder / SAMPLES),
            config=yaml.safe_dump(read_run_config(folder), sort_keys=False),
            versions=json.dumps(read_json(folder / VERSIONS_FILE), indent=2),
        )
    except (KeyError, jinja2.UndefinedError) as error:
        raise CheckpointError(f"{LOG_FILE} or {RESULT_FILE} in {folder} lacks a value: {error}") from error
    write_text(folder / SUMMARY_FILE, page)
    return folder / SUMMARY_FILE


def draw_curve(lines: list[dict[str, Any]]) -> str:
    """Return a plot of a run's training loss and evaluation results as SVG."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    training = [line for line in lines if line["kind"] == "training"]
    evaluation = [line for line in lines if line["kind"] == "evaluation"]
    axes.plot(
        [line["update"] for line in training],
        [line["bits_per_token"] for line in training],
        color="0.75",
        label="training (bits per token)",
    )
    for key, label, style in (
        ("bits_per_byte", "held out, memory intact (bits per byte)", "o-"),
        ("bits_per_byte_memory_erased", "held out, memory erased (bits per byte)", "s--"),
        ("accuracy", "recall accuracy (mean over distances)", "o-"),
        ("accuracy_memory_erased", "recall accuracy, memory erased", "s--"),
    ):
        measured = [line for line in evaluation if key in line]
        if measured:
            axes.plot([line["update"] for line in measured], [line[key] for line in measured], style, label=label, ms=4)
    axes.set_xlabel("update")
    axes.set_ylabel("bits")
    axes.grid(alpha=0.3)
    axes.legend()
    return _as_svg(figure)


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
    axes.set_yscale("log")
    axes.set_xlabel("segments before the end of the rollout")
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.3)
    axes.legend()
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
