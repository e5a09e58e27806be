"""The `memformer evaluate` command."""

import dataclasses
import json
import time

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of, open_given, prepare_data_of, run_config_of, source_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.data import (
    SourceConfig,
)
from memformer.evaluation.likelihood import Result, content_unit, evaluate
from memformer.utils.progress import ProgressBar

EVALUATE_HELP = """Evaluate a model on held-out documents: perplexity, bits per token and bits per byte.

RUN is a run folder, or a folder from save_pretrained that also holds a tokenizer. Every token of every document is
predicted once. All metrics are computed twice: with the memory intact, and with the memory erased before every
segment (a segment is the fixed number of tokens that the model reads at a time). The difference is the memory gain.
A run on a recall task is evaluated by the accuracy of its answers instead.

  memformer evaluate runs/demo
  memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json
"""


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `memformer evaluate`."""
    parser = new_parser("evaluate", EVALUATE_HELP, "RUN [--data.kind KIND --data.path PATH] [--json]")
    add_run_arguments(parser)
    parser.add_argument(
        "--data",
        type=SourceConfig | None,
        default=None,
        help="Documents to evaluate on (keys: see --data.help), by default of the kind that the run was trained on. "
        "Default: the run's held-out documents.",
    )
    parser.add_argument(
        "--num_lanes", type=int | None, default=None, help="Documents read in parallel (the batch size). Default: 8."
    )
    return parser


def run_evaluate(argv: list[str]) -> None:
    """Evaluate a run on its held-out data, or on other documents.

    Raises:
        InputError: The run, the data or an option is invalid.
    """
    options = parse(evaluate_parser(), argv, sections={"data": SourceConfig})
    num_lanes = positive(options, "num_lanes", default=8)
    run = load_run_of(options)
    result: Result
    source = source_of(run, options, argv)
    if source is None:
        run_config = run_config_of(run)
        if run_config.data.recall is not None:
            refuse_options(options, ("num_lanes",), kind="on a recall task")
        data = prepare_data_of(run, run_config.data)
        training = dataclasses.replace(run_config.training, num_lanes=num_lanes)
        started = time.monotonic()
        num_tokens = data.evaluation_tokens(run.model, training, is_final=True)
        with ProgressBar("evaluating", num_tokens, unit="token") as progress:
            result = data.evaluate(run.model, training, is_final=True, progress=progress.advance_to)
    else:
        corpus = open_given(run, source)
        started = time.monotonic()
        with ProgressBar("evaluating", corpus.num_tokens, unit="token") as progress:
            result = evaluate(
                run.model,
                corpus,
                num_lanes=num_lanes,
                unit=content_unit(run.tokenizer),
                progress=progress.advance_to,
            )
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps({"weights": str(run.weights), "seconds": seconds, **result.to_dict()}))
    else:
        print(result.to_table())
        print(f"{seconds:,.1f} s; weights: {run.weights}")
