"""The `memformer compare` command."""

import json

from jsonargparse import ArgumentParser

from memformer.cli.parsing import new_parser, parse
from memformer.errors import InputError
from memformer.utils.files import check_can_write, user_path
from memformer.utils.progress import print_warning

COMPARE_HELP = """Compare runs: one table and one plot of their curves over the updates.

The table has the best, the last and the final result on held-out data, in the unit of the runs (bits per byte, bits per
pixel, or the accuracy of a recall task), the number of parameters, the size of a stream's state, the training tokens
and the speed; then the keys of the configs that differ. The runs may be of different models, and may be in progress.

  memformer compare runs/book runs/transformer-xl
  memformer compare runs/*-seed-0 --output seeds.png --json
"""


def compare_parser() -> ArgumentParser:
    """Return the parser of `memformer compare`."""
    parser = new_parser("compare", COMPARE_HELP, "RUN RUN ... [--output FILE.png] [--json]")
    parser.add_argument("runs", type=str, nargs="+", help="Run folders.")
    parser.add_argument("--output", type=str, default="compare.png", help="PNG file to write the plot to.")
    parser.add_argument("--json", action="store_true", help="Print the result to stdout as one JSON object.")
    return parser


def run_compare(argv: list[str]) -> None:
    """Print a table of several runs and write a plot of their curves.

    Raises:
        InputError: There are fewer than two runs, or a folder does not contain a trained run.
    """
    # Imported here, because plots are slow to import.
    from memformer.evaluation.plots import write_figure
    from memformer.training.comparison import find_differences, same_data, same_evaluations, summarize_run, to_table
    from memformer.training.curves import draw_comparison

    options = parse(compare_parser(), argv)
    if len(options.runs) < 2:
        raise InputError(f"memformer compare needs at least two runs, not only {options.runs[0]}")
    output = user_path(options.output)
    check_can_write(output)
    if output.suffix.lower() != ".png":
        raise InputError(f"output ({options.output}) must end in .png")
    runs = [summarize_run(user_path(run), warn=print_warning) for run in options.runs]
    write_figure(output, draw_comparison([(run.folder, run.lines, run.metric) for run in runs]))
    if options.json:
        result = {
            "runs": [run.to_dict() for run in runs],
            "differences": find_differences([run.config for run in runs]),
            "same_data": same_data(runs),
            "same_evaluations": same_evaluations(runs),
            "figure": str(output),
        }
        print(json.dumps(result))
    else:
        print(f"{to_table(runs)}\nwrote {output}")
