"""Implementation of `memformer reproduce`: train the missing runs of a table and write the results."""

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memformer.errors import InputError
from memformer.evaluation.plots import write_figure
from memformer.reproduction.costs import costs_names, measure_costs
from memformer.reproduction.headline import Headline, headline_names, measure_part, read_headline
from memformer.reproduction.headline_results import draw_headline, headline_json, headline_markdown
from memformer.reproduction.results import collect, draw, to_json, to_markdown
from memformer.reproduction.reuse import ParseConfig, check_runs, parse_run
from memformer.reproduction.runs import Run, check_data, finish_runs, plan_runs
from memformer.reproduction.tables import Table, read_table, table_names, tables_folder
from memformer.utils.checks import check_integer
from memformer.utils.files import user_path, write_json, write_text
from memformer.utils.ownership import owned_folder


def reproduce(options: Any, train_options: Sequence[str], *, parse: ParseConfig) -> str:
    """Train the missing runs of a table, write table.md, table.json and table.png, and return the text to print.

    Args:
        options: The options of the command.
        train_options: Additional options of `memformer train`, for every run.
        parse: Returns the config of `memformer train` for its arguments.

    Raises:
        InputError: The table, scale or row is unknown, an option differs between runs, a finished run was trained
            otherwise, or runs failed.
        Interrupted: SIGINT or SIGTERM arrived; the runs in training were saved.
    """
    folder = tables_folder()
    costs, headlines = costs_names(folder), headline_names(folder)
    known = [*table_names(folder), *costs, *headlines]
    if options.table not in known:
        raise InputError(f"unknown table {options.table!r}; the tables are {', '.join(sorted(known))}")
    output = user_path(f"runs/{options.table}-{options.scale}" if options.folder is None else options.folder)
    if options.table in costs:
        _refuse_training_options(options, train_options)
        with owned_folder(output, option="--folder"):
            return _write_costs(folder / options.table, output, options)
    for name, value in (("seeds", options.seeds), ("jobs", options.jobs)):
        check_integer(name, value, 1)
    for option in train_options:
        if (name := option.partition("=")[0]) in _SET_FOR_EACH_RUN:
            raise InputError(f"{name} cannot be given after --: {_SET_FOR_EACH_RUN[name]}")
    if options.table in headlines:
        return _reproduce_headline(folder / options.table, output, options, train_options, parse)
    table = read_table(folder / options.table)
    data = str(user_path(options.data))
    runs = plan_runs(
        table,
        table.rows_at(options.scale) if options.rows is None else table.choose(options.rows),
        scale=options.scale,
        seeds=range(options.seeds),
        folder=output,
        data=data,
    )
    if options.only_write:  # also while another process trains
        check_runs([run for run in runs if run.is_finished], options=train_options, parse=parse)
        return _write_table(table, runs, output, options, train_options)
    check_data(runs, table, data=data, options=train_options)
    with owned_folder(output, option="--folder"):
        check_runs(runs, options=train_options, parse=parse)
        finish_runs(runs, jobs=options.jobs, options=train_options)
        return _write_table(table, runs, output, options, train_options)


# Options of `memformer train` that differ between the runs of a table, and what to do instead.
_SET_FOR_EACH_RUN = {
    "--seed": "every run has its own seed; --seeds N, before --, trains seeds 0 to N-1",
    "--folder": "every run has its own folder, in the --folder before --",
    "--resume": "runs that were begun are continued anyway",
}


def _refuse_training_options(options: Any, train_options: Sequence[str]) -> None:
    given = {
        "--seeds": options.seeds != 1,
        "--rows": options.rows is not None,
        "--jobs": options.jobs != 1,
        "--only_write": options.only_write,
        "--data": options.data != "data",
    }
    if names := [name for name, is_given in given.items() if is_given] + [*train_options[:1]]:
        raise InputError(f"{', '.join(names)} cannot be given: {options.table} trains nothing, it measures costs")


def _reproduce_headline(
    folder: Path, output: Path, options: Any, train_options: Sequence[str], parse: ParseConfig
) -> str:
    if options.rows is not None:
        raise InputError(f"--rows ({' '.join(options.rows)}) is not an option of {options.table}, which has fixed rows")
    headline = read_headline(folder, options.scale)
    data = str(user_path(options.data))
    # Beside the output folder are those of the tables, whose runs are used.
    tables = output.absolute().parent
    plans = [part.plan(seeds=range(options.seeds), folder=tables, data=data) for part in headline.parts]
    if options.only_write:
        finished = [run for runs in plans for run in runs if run.is_finished]
        check_runs(finished, options=train_options, parse=parse)
        return _write_headline(headline, plans, output, options, train_options, parse)
    for part, runs in zip(headline.parts, plans, strict=True):
        check_data(runs, part.table, data=data, options=train_options)
    with contextlib.ExitStack() as stack:
        for owned in dict.fromkeys([output, *(part.folder_in(tables) for part in headline.parts)]):
            stack.enter_context(owned_folder(owned, option="--folder"))
        every = [run for runs in plans for run in runs]
        check_runs(every, options=train_options, parse=parse)
        finish_runs(every, jobs=options.jobs, options=train_options)
        return _write_headline(headline, plans, output, options, train_options, parse)


def _write_headline(
    headline: Headline,
    plans: Sequence[Sequence[Run]],
    output: Path,
    options: Any,
    train_options: Sequence[str],
    parse: ParseConfig,
) -> str:
    folders = dict.fromkeys(str(run.folder.parent) for runs in plans for run in runs)
    if not any(run.is_finished for runs in plans for run in runs):
        raise InputError(f"no run in {' or '.join(folders)} is finished; there is nothing to write")
    workloads = [
        part.workload(parse_run(runs[0], train_options, parse))
        for part, runs in zip(headline.parts, plans, strict=True)
    ]
    measured = [
        measure_part(*part, rounds=headline.rounds, say=_say)
        for part in zip(headline.parts, plans, workloads, strict=True)
    ]
    figures, markdown = headline_json(headline, measured, workloads), headline_markdown(headline, measured)
    figure = draw_headline(headline, measured)
    return _write(output, figures, markdown, figure, train_options=train_options, is_json=options.json)


def _write_table(table: Table, runs: Sequence[Run], output: Path, options: Any, train_options: Sequence[str]) -> str:
    rows = collect(runs, table.scale(options.scale))
    if not rows:
        raise InputError(f"no run in {output} is finished; there is nothing to write")
    markdown, figures = to_markdown(table, rows, options.scale), to_json(table, rows, options.scale)
    figure = draw(table, rows, options.scale)
    return _write(output, figures, markdown, figure, train_options=train_options, is_json=options.json)


def _write_costs(folder: Path, output: Path, options: Any) -> str:
    figures, markdown, figure = measure_costs(folder, options.scale, say=_say)
    return _write(output, figures, markdown, figure, is_json=options.json)


def _write(
    output: Path,
    figures: dict[str, Any],
    markdown: str,
    figure: Figure,
    *,
    train_options: Sequence[str] = (),
    is_json: bool,
) -> str:
    if train_options:
        figures = {**figures, "options": list(train_options)}
        markdown += f"\nOptions of `memformer train` given for all runs: `{shlex.join(train_options)}`.\n"
    write_text(output / "table.md", markdown)
    write_json(output / "table.json", figures)
    write_figure(output / "table.png", figure)
    return json.dumps(figures) if is_json else f"{markdown}\nwrote {output}/table.md, table.json and table.png"


def _say(message: str) -> None:
    print(f"memformer: {message}", file=sys.stderr, flush=True)
