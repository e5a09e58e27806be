"""`memformer evaluate`."""

import dataclasses
import json
import time

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of, run_config_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.data import (
    SourceConfig,
)
from memformer.evaluation.likelihood import Result, evaluate
from memformer.training.config import DataConfig
from memformer.training.run_data import (
    open_corpus,
    prepare_data,
)

EVALUATE_HELP = """Report how well a model predicts documents, and what its memory is worth.

RUN is a run folder, or a folder from save_pretrained with a tokenizer. Every token of every document counts once.
Beside each figure stands the same with the memory erased before every segment.

  memformer evaluate runs/demo
  memformer evaluate runs/demo --data.kind text --data.path my_notes.txt --json
"""


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `memformer evaluate`."""
    parser = new_parser("evaluate", EVALUATE_HELP, "RUN [--data.kind KIND --data.path PATH] [--json]")
    add_run_arguments(parser)
    parser.add_argument(
        "--data", type=SourceConfig | None, default=None, help="Documents; the run's held-out ones if not given."
    )
    parser.add_argument(
        "--num_lanes", type=int | None, default=None, help="Documents read side by side; 8 if not given."
    )
    return parser


def run_evaluate(argv: list[str]) -> None:
    """Evaluate a run on what it holds out, or on other documents.

    Raises:
        InputError: The run or the data is wrong.
    """
    options = parse(evaluate_parser(), argv)
    num_lanes = positive(options, "num_lanes", default=8)
    run = load_run_of(options)
    result: Result
    if options.data is None:
        run_config = run_config_of(run)
        if run_config.data.recall is not None:
            refuse_options(options, ("num_lanes",), kind="on a recall task")
        data = prepare_data(run_config.data, tokenizer=run.tokenizer)
        training = dataclasses.replace(run_config.training, num_lanes=num_lanes)
        started = time.monotonic()
        result = data.evaluate(run.model, training, is_final=True)
    else:
        data_config = DataConfig() if run.run_config is None else run_config_of(run).data
        corpus = open_corpus(
            dataclasses.replace(data_config, max_document_tokens=None), options.data, tokenizer=run.tokenizer
        )
        started = time.monotonic()
        result = evaluate(run.model, corpus, num_lanes=num_lanes)
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps({"weights": str(run.weights), "seconds": seconds, **result.to_dict()}))
    else:
        print(result.to_table())
        print(f"{seconds:,.1f} s; weights: {run.weights}")
