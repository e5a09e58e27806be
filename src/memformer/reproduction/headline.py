"""The claim of the paper's abstract on trained models: definition of the comparison, its runs and what is measured."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.models import load_model
from memformer.reproduction.inference import Times, Workload, measure_inference_growth, measure_times
from memformer.reproduction.results import RowFigures, collect
from memformer.reproduction.runs import TableRun, plan_runs
from memformer.reproduction.tables import Table, check_keys, check_names, read_table
from memformer.training.config import RunConfig
from memformer.training.run_folder import BEST
from memformer.utils.checks import check_integer, refuse_unknown_keys
from memformer.utils.yaml_files import read_yaml

HEADLINE_FILE = "headline.yaml"

Group = Literal["transformer_xl", "memformer", "others"]
Cost = Literal["state_bytes", "memory_growth_bytes", "evaluation_seconds", "generation_seconds", "flops"]
COSTS: tuple[Cost, ...] = ("state_bytes", "memory_growth_bytes", "evaluation_seconds", "generation_seconds", "flops")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The trained models of one table at one scale.

    Attributes:
        title: Title of the part.
        table: The table that trains the models.
        scale: Scale of the table.
        streams: Token streams that are scored side by side when time and memory are measured.
        tokens: Tokens of each stream.
        transformer_xl: The Transformer-XLs, which are the curve: row key to label.
        memformer: The Memformers that are compared with the curve: row key to label.
        others: Other rows: row key to label.
    """

    title: str
    table: Table
    scale: str
    streams: int
    tokens: int
    transformer_xl: dict[str, str]
    memformer: dict[str, str]
    others: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> dict[str, tuple[Group, str]]:
        """Group and label of each row, by row key, in the order of the comparison."""
        groups: tuple[tuple[Group, dict[str, str]], ...] = (
            ("transformer_xl", self.transformer_xl),
            ("memformer", self.memformer),
            ("others", self.others),
        )
        return {key: (group, label) for group, rows in groups for key, label in rows.items()}

    def folder_in(self, folder: Path) -> Path:
        """Return the output folder of the part's table, whose run folders are used, in a folder of such folders."""
        return folder / f"{self.table.key}-{self.scale}"

    def plan(self, *, seeds: Sequence[int], folder: Path, data: str) -> list[TableRun]:
        """Return the runs, with the same configs and folders as those of the table's own command.

        Args:
            seeds: The seeds.
            folder: Folder of the tables' output folders.
            data: Folder of the data sets.

        Raises:
            InputError: A row does not exist at the scale.
        """
        rows = self.table.choose(self.labels)
        return plan_runs(self.table, rows, scale=self.scale, seeds=seeds, folder=self.folder_in(folder), data=data)

    def workload(self, config: RunConfig) -> Workload:
        """Return the amount to read and to generate when costs are measured, on the device of a run."""
        return Workload(streams=self.streams, tokens=self.tokens, device=config.device, threads=config.threads)


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The comparison at one scale.

    Attributes:
        key: Name of the definition's folder.
        title: Title of the comparison.
        paper: The paper's claim as text.
        paper_ratios: The paper's ratios to its baselines, by cost.
        scale: The scale.
        note: Note for readers of the results.
        rounds: Timed rounds.
        parts: The parts.
    """

    key: str
    title: str
    paper: str
    paper_ratios: dict[str, float]
    scale: str
    note: str
    rounds: int
    parts: list[Part]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The results and costs of one row.

    Attributes:
        group: Group of the row.
        label: Label of the row.
        figures: Quality by seed, number of parameters.
        state_bytes: Size in bytes of the state of one stream (`Session.state_bytes`).
        memory_growth_bytes: Peak memory growth while new streams are scored.
        times: Seconds per token of evaluation and of generation, in every round.
        flops: Floating-point operations per token.
    """

    group: Group
    label: str
    figures: RowFigures
    state_bytes: int
    memory_growth_bytes: int
    times: Times
    flops: float

    def cost(self, name: Cost) -> float:
        """Return a cost; of the rounds' times, the median."""
        if name == "evaluation_seconds":
            return statistics.median(self.times.evaluation)
        if name == "generation_seconds":
            return statistics.median(self.times.generation)
        return float(getattr(self, name))

    @property
    def bits(self) -> dict[int, float]:
        """Held-out bits per byte (per pixel for images), by seed."""
        return {seed: result["with_memory"]["bits_per_byte"] for seed, result in self.figures.results.items()}

    @property
    def unit(self) -> str:
        """Unit of the held-out data: byte, pixel or value."""
        return str(next(iter(self.figures.results.values()))["unit"])


def headline_names(folder: Path) -> list[str]:
    """Return the names of the available comparisons."""
    return sorted(file.parent.name for file in folder.glob(f"*/{HEADLINE_FILE}"))


def read_headline(folder: Path, scale: str) -> Headline:
    """Return the comparison in a folder at one scale; the tables are in folders beside it.

    Raises:
        InputError: A file is missing or malformed, or there is no such scale, table or row.
    """
    file = folder / HEADLINE_FILE
    given = read_yaml(file)
    check_names(given, required=("title", "paper", "scales"), owner=str(file))
    check_names(given["paper"], required=("text", "ratios"), owner=f"{file}, paper")
    refuse_unknown_keys(given["paper"]["ratios"], valid=COSTS, owner=f"{file}, paper.ratios")
    if scale not in given["scales"]:
        raise InputError(f"{folder.name} has no scale {scale!r}; it has {', '.join(given['scales'])}")
    shared, owner = given["scales"][scale], f"{file}, scale {scale}"
    check_names(shared, required=("note", "rounds", "parts"), owner=owner)
    check_integer(f"rounds of {owner}", shared["rounds"], 1)
    parts = [_read_part(part, folder.parent, owner=f"{owner}, part {n}") for n, part in enumerate(shared["parts"], 1)]
    return Headline(
        key=folder.name,
        title=given["title"],
        paper=given["paper"]["text"],
        paper_ratios=given["paper"]["ratios"],
        scale=scale,
        **{**shared, "parts": parts},
    )


def _read_part(fields: dict[str, Any], tables: Path, *, owner: str) -> Part:
    check_keys(fields, kind=Part, owner=owner)
    for name in ("streams", "tokens"):
        check_integer(f"{name} of {owner}", fields[name], 1)
    part = Part(**{**fields, "table": read_table(tables / fields["table"])})
    part.table.scale(part.scale)
    part.table.choose(part.labels)
    if len(part.labels) < len(part.transformer_xl) + len(part.memformer) + len(part.others):
        raise InputError(f"{owner}: a row is in more than one of transformer_xl, memformer and others")
    return part


def measure_part(
    part: Part, runs: Sequence[TableRun], workload: Workload, *, rounds: int, say: Callable[[str], None]
) -> list[Measured]:
    """Measure all rows of a part that have a finished run, in the order of the part.

    The cost depends on the architecture alone, so that each row is measured with the weights of one of its runs.

    Args:
        part: The part.
        runs: Its runs.
        workload: What the models read and generate, and where.
        rounds: Timed rounds.
        say: Receives messages about the progress.

    Raises:
        CheckpointError: A file of a run is missing or damaged.
        InputError: A measurement failed.
    """
    scale = part.table.scale(part.scale)
    rows = {figures.row.key: figures for figures in collect(runs, scale)}
    found = [(rows[key], group, label) for key, (group, label) in part.labels.items() if key in rows]
    folders = [_weights_of(figures, runs) for figures, *_ in found]
    if not found:
        return []
    say(f"{part.title}: timing {len(found)} models in turn")
    measured = []
    for folder, times, (figures, group, label) in zip(
        folders, measure_times(folders, workload, rounds=rounds), found, strict=True
    ):
        say(f"{part.title}: measuring the memory growth of {label}")
        measured.append(
            Measured(
                group=group,
                label=label,
                figures=figures,
                state_bytes=Session(load_model(folder)).state_bytes,
                memory_growth_bytes=measure_inference_growth(folder, workload),
                times=times,
                flops=figures.flops / scale.flops_tokens,
            )
        )
    return measured


def _weights_of(figures: RowFigures, runs: Sequence[TableRun]) -> Path:
    return next(run.folder for run in runs if run.row.key == figures.row.key and run.is_finished) / BEST
