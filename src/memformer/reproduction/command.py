"""Implementation of `memformer reproduce`: train the missing runs of a table and write the results."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from memformer.errors import InputError
from memformer.evaluation.plots import write_figure
from memformer.reproduction.costs import costs_names, measure_costs
from memformer.reproduction.results import collect, draw, to_json, to_markdown
from memformer.reproduction.reuse import ParseConfig, check_finished
from memformer.reproduction.runs import Run, check_data, finish_runs, plan_runs
from memformer.reproduction.tables import Row, Table, read_table, table_names, tables_folder
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
        InputError: The table, scale or row is unknown, a finished run was trained otherwise, or runs failed.
    """
    folder = tables_folder()
    known = [*table_names(folder), *costs_names(folder)]
    if options.table not in known:
        raise InputError(f"unknown table {options.table!r}; the tables are {', '.join(sorted(known))}")
    output = user_path(options.folder or f"runs/{options.table}-{options.scale}")
    if options.table in costs_names(folder):
        with owned_folder(output, option="--folder"):
            return _write_costs(folder / options.table, output, options)
    for name, value in (("seeds", options.seeds), ("jobs", options.jobs)):
        check_integer(name, value, 1)
    table = read_table(folder / options.table)
    data = str(user_path(options.data))
    runs = plan_runs(
        table,
        _choose(table, options.rows, options.scale),
        scale=options.scale,
        seeds=range(options.seeds),
        folder=output,
        data=data,
    )
    if options.only_write:  # also while another process trains
        return _write_table(table, runs, output, options)
    check_data(runs, table, data=data, options=train_options)
    with owned_folder(output, option="--folder"):
        check_finished(runs, options=train_options, parse=parse)
        finish_runs(runs, jobs=options.jobs, options=train_options)
        return _write_table(table, runs, output, options)


def _write_table(table: Table, runs: Sequence[Run], output: Path, options: Any) -> str:
    rows = collect(runs, table.scale(options.scale))
    if not rows:
        raise InputError(f"no run in {output} is finished; there is nothing to write")
    markdown, figures = to_markdown(table, rows, options.scale), to_json(table, rows, options.scale)
    return _write(output, figures, markdown, draw(table, rows, options.scale), is_json=options.json)


def _write_costs(folder: Path, output: Path, options: Any) -> str:
    figures, markdown, figure = measure_costs(folder, options.scale, say=_say)
    return _write(output, figures, markdown, figure, is_json=options.json)


def _write(output: Path, figures: dict[str, Any], markdown: str, figure: Figure, *, is_json: bool) -> str:
    write_text(output / "table.md", markdown)
    write_json(output / "table.json", figures)
    write_figure(output / "table.png", figure)
    return json.dumps(figures) if is_json else f"{markdown}\nwrote {output}/table.md, table.json and table.png"


def _choose(table: Table, keys: Sequence[str] | None, scale: str) -> list[Row]:
    if keys is None:
        return table.rows_at(scale)
    known = {row.key: row for row in table.rows}
    if unknown := [key for key in keys if key not in known]:
        raise InputError(f"{table.key} has no row {unknown[0]!r}; it has {', '.join(known)}")
    return [known[key] for key in keys]


def _say(message: str) -> None:
    print(f"memformer: {message}", file=sys.stderr, flush=True)
