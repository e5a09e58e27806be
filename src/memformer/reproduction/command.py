"""Implementation of `memformer reproduce`: train the missing runs of a table and write the results."""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memformer.errors import InputError
from memformer.evaluation.plots import write_figure
from memformer.reproduction.costs import costs_names, measure_costs
from memformer.reproduction.headline import Headline, headline_names, measure_part, read_headline
from memformer.reproduction.headline_results import draw_headline, headline_json, headline_markdown
from memformer.reproduction.inference import Workload
from memformer.reproduction.measure import check_growth_is_measurable
from memformer.reproduction.results import collect, draw, to_json, to_markdown
from memformer.reproduction.reuse import ParseConfig, check_runs, parse_run
from memformer.reproduction.runs import (
    TableRun,
    check_data,
    check_train_options,
    finish_runs,
    plan_runs,
    trained_seeds,
)
from memformer.reproduction.tables import Row, Table, read_table, table_names, tables_folder
from memformer.utils.checks import check_integer
from memformer.utils.files import check_can_write, user_path, write_json, write_text
from memformer.utils.ownership import owned_folder

# Results as JSON values, as Markdown and as a plot.
Results = tuple[dict[str, Any], str, Figure]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The runs of a command, and how their results are computed.

    Attributes:
        runs: For each table, its runs.
        folders: For each table, the folder of its runs.
        results: Returns the results of the finished runs of each table.
    """

    runs: list[tuple[Table, list[TableRun]]]
    folders: list[Path]
    results: Callable[[list[list[TableRun]]], Results]


def reproduce(options: Any, train_options: Sequence[str], *, parse: ParseConfig) -> str:
    """Train the missing runs of a table, write table.md, table.json and table.png, and return the text to print.

    Args:
        options: The options of the command.
        train_options: Additional options of `memformer train`, for every run.
        parse: Returns the config of `memformer train` for its arguments.

    Raises:
        InputError: The table, scale or row is unknown, an option differs between runs, a finished run was trained
            otherwise, or runs failed.
        SaveError: The results cannot be written.
        Interrupted: SIGINT or SIGTERM arrived; the runs in training were saved.
    """
    folder = tables_folder()
    costs, headlines = costs_names(folder), headline_names(folder)
    known = [*table_names(folder), *costs, *headlines]
    if options.table not in known:
        raise InputError(f"unknown table {options.table!r}; the tables are {', '.join(sorted(known))}")
    output = user_path(f"runs/{options.table}-{options.scale}" if options.folder is None else options.folder)
    check_can_write(output / "table.json")
    if options.table in costs:
        _refuse_training_options(options, train_options)
        check_growth_is_measurable("auto")
        with owned_folder(output, option="--folder"):
            results = measure_costs(folder / options.table, options.scale, say=_say)
            return _write(output, results, train_options=(), is_json=options.json)
    for name, value in (("seeds", options.seeds), ("jobs", options.jobs)):
        if value is not None:
            check_integer(name, value, 1)
    check_train_options(train_options)
    data = str(user_path(options.data))
    if options.table in headlines:
        plan = _plan_headline(folder / options.table, output, data, options, train_options, parse)
    else:
        plan = _plan_table(read_table(folder / options.table), output, data, options)
    write = partial(_write, output, train_options=train_options, is_json=options.json)
    if options.only_write:  # also while another process trains
        finished = _finished(plan)
        check_runs([run for runs in finished for run in runs], options=train_options, parse=parse)
        return write(plan.results(finished))
    for table, runs in plan.runs:
        check_data(runs, table, data=data, options=train_options)
    with contextlib.ExitStack() as stack:
        for owned in dict.fromkeys([output, *plan.folders]):
            stack.enter_context(owned_folder(owned, option="--folder"))
        every = [run for _, runs in plan.runs for run in runs]
        check_runs(every, options=train_options, parse=parse)
        finish_runs(every, jobs=options.jobs, options=train_options)
        return write(plan.results(_finished(plan)))


def _refuse_training_options(options: Any, train_options: Sequence[str]) -> None:
    given = {
        "--seeds": options.seeds is not None,
        "--rows": options.rows is not None,
        "--jobs": options.jobs != 1,
        "--only_write": options.only_write,
        "--data": options.data != "data",
    }
    if names := [name for name, is_given in given.items() if is_given] + [*train_options[:1]]:
        raise InputError(f"{', '.join(names)} cannot be given: {options.table} trains nothing, it measures costs")


def _plan_table(table: Table, output: Path, data: str, options: Any) -> _Plan:
    rows = table.rows_at(options.scale) if options.rows is None else table.choose(options.rows)
    seeds = _seeds(options, rows, output)
    runs = plan_runs(table, rows, scale=options.scale, seeds=seeds, folder=output, data=data)

    def results(finished: list[list[TableRun]]) -> Results:
        found = collect(finished[0], table.scale(options.scale))
        described = table, found, options.scale
        return to_json(*described), to_markdown(*described), draw(*described)

    return _Plan(runs=[(table, runs)], folders=[output], results=results)


def _seeds(options: Any, rows: Sequence[Row], folder: Path) -> Sequence[int]:
    """Return the seeds that are asked for; of results that are only written, by default all."""
    if options.only_write and options.seeds is None:
        return trained_seeds(rows, folder)
    return range(options.seeds or 1)


def _plan_headline(
    folder: Path, output: Path, data: str, options: Any, train_options: Sequence[str], parse: ParseConfig
) -> _Plan:
    if options.rows is not None:
        raise InputError(f"--rows ({' '.join(options.rows)}) is not an option of {options.table}, which has fixed rows")
    headline = read_headline(folder, options.scale)
    # Beside the output folder are those of the tables, whose runs are used.
    tables = output.absolute().parent
    folders = [part.folder_in(tables) for part in headline.parts]
    if output.absolute() in folders:
        raise InputError(f"--folder ({options.folder}) is the folder of a table's runs; {options.table} needs its own")
    seeds = sorted(
        {
            seed
            for part, own in zip(headline.parts, folders, strict=True)
            for seed in _seeds(options, part.table.choose(part.labels), own)
        }
    )
    plans = [part.plan(seeds=seeds, folder=tables, data=data) for part in headline.parts]
    # All runs of a part are measured on one device, with as many threads.
    first = [part.plan(seeds=[0], folder=tables, data=data)[0] for part in headline.parts]
    workloads = [
        part.workload(parse_run(run, train_options, parse)) for part, run in zip(headline.parts, first, strict=True)
    ]
    for workload in workloads:
        check_growth_is_measurable(workload.device)
    return _Plan(
        runs=[(part.table, runs) for part, runs in zip(headline.parts, plans, strict=True)],
        folders=folders,
        results=partial(_headline_results, headline, workloads),
    )


def _headline_results(
    headline: Headline, workloads: Sequence[Workload], finished: Sequence[Sequence[TableRun]]
) -> Results:
    measured = [
        measure_part(*part, rounds=headline.rounds, say=_say)
        for part in zip(headline.parts, finished, workloads, strict=True)
    ]
    figures, markdown = headline_json(headline, measured, workloads), headline_markdown(headline, measured)
    return figures, markdown, draw_headline(headline, measured)


def _finished(plan: _Plan) -> list[list[TableRun]]:
    """Return the runs of each table that are finished by now.

    Raises:
        InputError: There is none.
    """
    finished = [[run for run in runs if run.is_finished] for _, runs in plan.runs]
    if not any(finished):
        folders = " or ".join(map(str, plan.folders))
        raise InputError(f"no run in {folders} is finished; there is nothing to write")
    return finished


def _write(output: Path, results: Results, *, train_options: Sequence[str], is_json: bool) -> str:
    figures, markdown, figure = results
    if train_options:
        figures = {**figures, "options": list(train_options)}
        markdown += f"\nOptions of `memformer train` given for all runs: `{shlex.join(train_options)}`.\n"
    write_text(output / "table.md", markdown)
    write_json(output / "table.json", figures)
    write_figure(output / "table.png", figure)
    return json.dumps(figures) if is_json else f"{markdown}\nwrote {output}/table.md, table.json and table.png"


def _say(message: str) -> None:
    print(f"memformer: {message}", file=sys.stderr, flush=True)
