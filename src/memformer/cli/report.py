"""The `memformer report` command."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from memformer.cli.parsing import new_parser, parse
from memformer.utils.files import user_path

if TYPE_CHECKING:
    from memformer.evaluation.kept_shares import KeptShares

REPORT_HELP = """Write summary.html into a run folder: a page with the result, the learning curves, a picture of the
memory, the memory gradients, all samples, and the config.

`memformer train` does this at the end of a run; this command also works while a run is in progress. The picture of the
memory is drawn from the best weights so far and the run's held-out data. With --with, the curves of other runs are
drawn beside those of the run, with a table of their results and of what differs in their configs, as `memformer
compare` prints it.

  memformer report runs/demo
  memformer report runs/demo --with runs/transformer-xl runs/more-slots
"""


def report_parser() -> ArgumentParser:
    """Return the parser of `memformer report`."""
    parser = new_parser("report", REPORT_HELP, "RUN [--with RUN ...] [--json]")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument(
        "--with",
        type=str,
        nargs="+",
        default=[],
        help="Folders of other runs to compare with. A run that is named twice is drawn once.",
    )
    parser.add_argument("--json", action="store_true", help="Print the result to stdout as one JSON object.")
    return parser


def run_report(argv: list[str]) -> None:
    """Write the HTML page of a run.

    Raises:
        InputError: A folder does not contain a run.
    """
    from memformer.training.report import write_report  # plots are slow to import

    options = parse(report_parser(), argv)
    summary = write_report(options.run, others=options["with"], memory=partial(_read_memory, user_path(options.run)))
    print(json.dumps({"summary": str(summary)}) if options.json else summary)


def _read_memory(folder: Path) -> "KeptShares":
    from memformer.cli.loading import prepare_data_of, run_config_of
    from memformer.evaluation.inspection import check_can_inspect
    from memformer.training.run_folder import load_run
    from memformer.training.run_memory import read_memory

    run = load_run(folder)
    check_can_inspect(run.model)  # before the data is read, which can take long
    return read_memory(run.model, prepare_data_of(run, run_config_of(run).data))
