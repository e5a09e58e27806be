"""The `memformer reproduce` command."""

from jsonargparse import ArgumentParser

from memformer.cli.parsing import new_parser, parse

REPRODUCE_HELP = """Train the models of one of the paper's tables and write the results beside the paper's numbers.

Tables: table1 (MNIST), table2 (text; also --scale books, code and paper_bpe), v1 (ablations of the paper's first
version: tasks, positions, memory slots, time horizons). table3 (training methods) and figure5 (compute and memory)
are measured in one or two minutes, without training. headline compares quality, memory and speed of models of table1
and table2.

Finished runs are reused and interrupted runs are resumed, so the command can be repeated until all runs are finished.
A finished run that was trained with other settings or on other data is refused.
The output folder contains a run folder per row and seed, and the results as table.md, table.json and table.png.
Options after -- are passed to every `memformer train`.
headline uses the run folders of the tables, which are beside its output folder, and measures them in the end, also with
--only_write: its times are comparable with each other, but not with those of another machine.

  memformer reproduce table1 --scale small --seeds 3 --jobs 2
  memformer reproduce table1 --scale paper --rows 06-memformer -- --device cuda
  memformer reproduce table1 --only_write
  memformer reproduce headline --seeds 3 --jobs 2
"""


def reproduce_parser() -> ArgumentParser:
    """Return the parser of `memformer reproduce`."""
    parser = new_parser("reproduce", REPRODUCE_HELP, "TABLE [--scale SCALE] [options] [-- options of train]")
    parser.add_argument("table", type=str, help="Table to reproduce, by one of the names above.")
    parser.add_argument(
        "--scale",
        default="small",
        help="Size of models and data: small (for a CPU), paper, or another scale that the table defines.",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=None,
        help="Number of seeds per row; the seeds are 0, 1, ... Default: 1; with --only_write, those that were trained.",
    )
    parser.add_argument(
        "--rows", type=str, nargs="+", default=None, help="Keys of the rows to train. Default: all. Not for headline."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Number of runs trained in parallel.")
    parser.add_argument("--data", type=str, default="data", help="Folder of the data sets; see experiments/README.md.")
    parser.add_argument("--folder", type=str, default=None, help="Output folder. Default: runs/TABLE-SCALE.")
    parser.add_argument(
        "--only_write", action="store_true", help="Do not train; write the results of finished runs of all seeds."
    )
    parser.add_argument("--json", action="store_true", help="Print the result to stdout as one JSON object.")
    return parser


def run_reproduce(argv: list[str]) -> None:
    """Train the rows of a table and write the results.

    Raises:
        InputError: The table is unknown, or runs failed.
    """
    from memformer.cli.run_config import parse_run_config
    from memformer.reproduction.command import reproduce

    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parse(reproduce_parser(), own)
    train_options = argv[len(own) + 1 :]
    print(reproduce(options, train_options, parse=lambda arguments: parse_run_config(arguments)[0]))
