"""HTML page of a run: result, learning curves, the memory, memory gradients, samples, config and versions."""

import base64
import functools
import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from memformer.errors import CheckpointError, InputError
from memformer.evaluation.kept_shares import KeptShares, draw_kept_shares
from memformer.evaluation.plots import arrange_panels, make_logarithmic, to_svg, use_whole_numbers
from memformer.training.checkpoint import is_checkpoint_name, updates_of
from memformer.training.comparison import RunSummary, summarize_run, to_table
from memformer.training.curves import draw_comparison, draw_run, metric_of
from memformer.training.logs import missing_value_sentence, read_log
from memformer.training.run_folder import LOG_FILE, RESULT_FILE, SAMPLES, VERSIONS_FILE, read_run_config
from memformer.utils.files import read_json, user_path, write_text
from memformer.utils.yaml_files import to_yaml

SUMMARY_FILE = "summary.html"


def write_report(
    folder: str | Path, *, others: Sequence[str | Path] = (), memory: Callable[[], KeptShares] | None = None
) -> Path:
    """Write summary.html into a run folder and return its path; the page is self-contained.

    Args:
        folder: The run folder.
        others: Folders of other runs, whose curves are drawn beside those of the run, with a table of all of them. A
            run that is named twice is drawn once.
        memory: Reads the memory for the page (`read_memory`). If it raises an error, the page is written with a
            sentence that says which, in place of the picture. None: the page has no picture.

    Raises:
        InputError: A folder does not contain a trained run.
        CheckpointError: A file of a run is damaged.
        SaveError: Writing failed.
    """
    folder = user_path(folder)
    if not (folder / LOG_FILE).is_file():
        raise InputError(f"{folder} has no {LOG_FILE}; a report needs a trained run")
    lines = read_log(folder)
    result = read_json(folder / RESULT_FILE) if (folder / RESULT_FILE).is_file() else None
    training = [line for line in lines if line["kind"] == "training"]
    config = read_run_config(folder)
    metric = metric_of(config)
    compared = _summarize(folder, others)
    try:
        curves = draw_comparison([(run.folder, run.lines, run.metric) for run in compared]) if compared else None
        evaluations = [line for line in lines if metric.key in line]
        page = (
            _environment()
            .get_template("summary.html.jinja")
            .render(
                name=folder.resolve().name,
                folder=str(folder),
                curve=to_svg(curves or draw_run(lines, metric)),
                comparison=to_table(compared) if compared else None,
                metric=metric,
                evaluation=evaluations[-1] if evaluations else None,
                memory=_Picture.of(memory),
                gradients=draw_gradients(training),
                result=result,
                last=training[-1] if training else None,
                samples=_read_samples(folder / SAMPLES, updates={line["update"] for line in evaluations}),
                has_tensorboard=(folder / "tensorboard").is_dir(),
                config=to_yaml(config),
                versions=json.dumps(read_json(folder / VERSIONS_FILE), indent=2),
            )
        )
    except (KeyError, jinja2.UndefinedError) as error:
        raise CheckpointError(missing_value_sentence(folder, error)) from error
    write_text(folder / SUMMARY_FILE, page)
    return folder / SUMMARY_FILE


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("memformer.training"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _summarize(folder: Path, others: Sequence[str | Path]) -> list[RunSummary]:
    """Return the figures of the run and of the others, each once; nothing if there are no others."""
    folders: dict[Path, Path] = {}
    for each in (folder, *map(user_path, others)):
        folders.setdefault(each.resolve(), each)
    return [summarize_run(each) for each in folders.values()] if len(folders) > 1 else []


class _Picture(NamedTuple):
    """The picture of the memory, or the reason why there is none."""

    svg: str | None
    text: str
    num_timesteps: int = 0
    num_documents: int = 0

    @classmethod
    def of(cls, read: Callable[[], KeptShares] | None) -> "_Picture":
        if read is None:
            return cls(None, "the page was written without the run's data; memformer report reads it")
        # An error must not cost the rest of the page: the page says which one it was.
        try:
            kept = read()
            return cls(to_svg(draw_kept_shares(kept)), kept.description, len(kept.shares), len(kept.starts))
        except InputError as error:
            return cls(None, str(error).rstrip("."))
        except Exception as error:
            return cls(None, f"{type(error).__name__}: {error}".rstrip("."))


def draw_gradients(training: list[dict[str, Any]]) -> str | None:
    """Return a plot of the memory gradient norm per timestep of a rollout as SVG; None if all norms are 0."""
    lines = [line for line in training if any(line.get("memory_gradient_norms", []))]
    if not lines:
        return None
    figure = Figure(figsize=(8, 2.6))
    axes = figure.subplots()
    shown = sorted({0, len(lines) // 2, len(lines) - 1})
    for index, grey in zip(shown, ("0.75", "0.5", "0.0")[-len(shown) :], strict=True):
        norms = lines[index]["memory_gradient_norms"]
        segments_before_end = range(len(norms), 0, -1)
        axes.plot(segments_before_end, norms, "o-", color=grey, ms=4, label=f"update {lines[index]['update']:,}")
    axes.invert_xaxis()
    use_whole_numbers(axes.xaxis)
    make_logarithmic(axes, "y")
    axes.set_xlabel("segments before the end of the rollout")
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.3)
    arrange_panels(figure)
    return to_svg(figure)


class _Sample(NamedTuple):
    """A sample after an update: a text, or a PNG image in base64."""

    update: int
    text: str | None
    image: str | None


def _read_samples(folder: Path, *, updates: Container[int]) -> list[_Sample]:
    """Return the samples of these updates, oldest first; a run that began again may have left others."""
    samples = []
    # Samples have the names of checkpoints; the user may keep other files beside them.
    for file in sorted(file for file in folder.glob("*") if is_checkpoint_name(file.stem)):
        update = updates_of(file.with_suffix(""))
        if update not in updates:
            continue
        if file.suffix == ".png":
            samples.append(_Sample(update, None, base64.b64encode(file.read_bytes()).decode("ascii")))
        elif file.suffix == ".txt":
            samples.append(_Sample(update, file.read_text(encoding="utf-8", errors="replace"), None))
    return samples
