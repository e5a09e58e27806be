"""Plain-text and Markdown tables."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# Wider than any table of this package. The width is fixed, because a table may be written to a file.
_WIDTH = 10_000


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as plain text, without a trailing line break.

    The first column is left-aligned, the others are right-aligned.

    Args:
        columns: Names of the columns.
        rows: Cells of each row, one per column.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    drawn = io.StringIO()
    Console(file=drawn, width=_WIDTH, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, without a trailing line break; the first line has the names of the columns."""
    written = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(lines[0]), *written[1:]])
