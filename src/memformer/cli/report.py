"""The `memformer report` command."""

import json

from jsonargparse import ArgumentParser

from memformer.cli.parsing import new_parser, parse

REPORT_HELP = """Write summary.html into a run folder, with the loss curve, evaluation results, a sample and the config.

`memformer train` does this at the end of a run; this command also works while a run is in progress.

  memformer report runs/demo
"""


def report_parser() -> ArgumentParser:
    """Return the parser of `memformer report`."""
    parser = new_parser("report", REPORT_HELP, "RUN [--json]")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--json", action="store_true", help="Print the result to stdout as one JSON object.")
    return parser


def run_report(argv: list[str]) -> None:
    """Write the HTML summary of a run.

    Raises:
        InputError: The folder does not contain a run.
    """
    from memformer.training.report import write_report

    options = parse(report_parser(), argv)
    summary = write_report(options.run)
    print(json.dumps({"summary": str(summary)}) if options.json else summary)
