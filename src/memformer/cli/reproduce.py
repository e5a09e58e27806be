"""`memformer reproduce`."""

from jsonargparse import ArgumentParser

from memformer.cli.parsing import new_parser, parse

REPRODUCE_HELP = """Train the rows of one of the paper's tables, and write the table beside the paper's figures.

Tables: table1 (MNIST), table2 (text; also --scale books and paper_bpe), v1 (the paper's first version: tasks,
positions, slots, horizons). Measured in a minute or two without training: table3 (methods), figure5 (costs).

Runs that are finished are taken as they are, those that were stopped go on, so the command can be given again until all
are done. Into the folder go a run folder for every row and seed, table.md, table.json and table.png. What follows --
goes to every `memformer train`.

  memformer reproduce table1 --scale small --seeds 3 --jobs 2
  memformer reproduce table1 --scale paper --rows 06-memformer -- --device cuda
  memformer reproduce table1 --only_write
"""


def reproduce_parser() -> ArgumentParser:
    """Return the parser of `memformer reproduce`."""
    parser = new_parser("reproduce", REPRODUCE_HELP, "TABLE [--scale SCALE] [options] [-- options of train]")
    parser.add_argument("table", type=str, help="The table.")
    parser.add_argument("--scale", default="small", help="small, for a CPU; paper; or another that the table has.")
    parser.add_argument("--seeds", type=int, default=1, help="Seeds of every row: 0, 1, ...")
    parser.add_argument("--rows", type=str, nargs="+", default=None, help="Rows by their keys; all if not given.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs trained at a time.")
    parser.add_argument("--data", type=str, default="../shared/data", help="Folder of the data sets.")
    parser.add_argument("--folder", type=str, default=None, help="Where it lands; runs/TABLE-SCALE if not given.")
    parser.add_argument("--only_write", action="store_true", help="Train nothing; write what is finished.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object to stdout.")
    return parser


def run_reproduce(argv: list[str]) -> None:
    """Train the rows of a table, and write it.

    Raises:
        InputError: There is no such table, or runs failed.
    """
    from memformer.reproduction.command import reproduce

    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parse(reproduce_parser(), own)
    print(reproduce(options, argv[len(own) + 1 :]))
