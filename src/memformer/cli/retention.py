"""`memformer retention`."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of, run_config_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.data import (
    RecallConfig,
)
from memformer.errors import InputError
from memformer.evaluation.document_retention import DocumentRetention, measure_documents
from memformer.evaluation.recall import Recall, measure_recall
from memformer.training.config import RunConfig
from memformer.training.run_data import (
    DocumentData,
    RecallData,
    doubling_distances,
    first_documents,
    prepare_data,
)
from memformer.training.run_folder import (
    RUN_CONFIG_FILE,
    LoadedRun,
)
from memformer.utils.checks import check_seed
from memformer.utils.files import check_can_write, write_json
from memformer.utils.progress import SegmentProgress

RETENTION_FILE = "retention.json"


RETENTION_FIGURE_FILE = "retention.png"

RETENTION_HELP = """Report how long the memory of a run holds, into retention.json and retention.png.

Of a run on a recall task: how many answers are right by the distance between the last fact and the question, far
beyond the distances trained on. Of a run on documents: bits per token by the position in the document, with the memory
and with it erased; and bits per byte with the memory of d segments earlier in place of the present one, which tells
what the memory of the last d segments is worth, and what that of all before. Those figures are over the same tokens for
all d: the ones with at least as many segments of their document before them as the largest d. Bytes of them are
counted as the mean over all tokens.

  memformer retention runs/recall
  memformer retention runs/recall --distances 1 100 10000 60000 --num_facts 8 --num_episodes 16
  memformer retention runs/demo --delays 1 4 16 64 --max_tokens 1000000 --output notes/demo --json
"""


def retention_parser() -> ArgumentParser:
    """Return the parser of `memformer retention`; None means that an option was not given."""
    parser = new_parser("retention", RETENTION_HELP, "RUN [options of its kind] [--output FOLDER] [--json]")
    add_run_arguments(parser)
    parser.add_argument("--output", type=str, default=None, help="Folder for the files; the run folder if not given.")
    recall, documents = "Recall run: ", "Run on documents: "
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=None,
        help=recall + "segments from the last fact to the question; 1, 2, 4, ... 32 times the longest of training.",
    )
    numbers = (
        ("num_facts", recall + "facts of an episode; the most trained on if not given."),
        ("facts_per_segment", recall + "facts told in one segment; the most trained on if not given."),
        ("max_fact_gap", recall + "segments of filler between two that tell facts, at most; as trained if not given."),
        ("num_episodes", recall + "episodes, read side by side; 64 if not given."),
        ("questions", recall + "different questions asked of each episode at each distance, at most; 4 if not given."),
        ("seed", recall + "decides the episodes; 0 if not given."),
        ("max_tokens", documents + "held-out tokens, whole documents, the first that reach this; 200000 if not given."),
        ("num_lanes", documents + "documents read side by side; 8 if not given."),
    )
    for name, text in numbers:
        parser.add_argument(f"--{name}", type=int | None, default=None, help=text)
    parser.add_argument(
        "--delays",
        type=int,
        nargs="+",
        default=None,
        help=documents + "how many segments old a memory is read; 0, 1, 2, 4, ... 32, as far as documents reach.",
    )
    return parser


def run_retention(argv: list[str]) -> None:
    """Measure how long a run's memory holds, and write the figures and a picture of them.

    Raises:
        InputError: The run or an option is wrong, or an option is for the other kind of run.
    """
    from memformer.evaluation.plots import write_figure

    options = parse(retention_parser(), argv)
    if options.output is not None:
        check_can_write(Path(options.output) / RETENTION_FILE)
    run = load_run_of(options)
    if run.run_config is None:
        raise InputError(
            f"{run.folder} has no {RUN_CONFIG_FILE}, which tells what to measure on; a run folder is needed"
        )
    config = run_config_of(run)
    recall = config.data.recall
    if recall is not None:
        recall = _with_options(recall, options)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, recall=recall))
    started = time.monotonic()
    result, figure = (_retention_of_documents if recall is None else _retention_of_facts)(run, config, options)
    figures: dict[str, Any] = {"weights": str(run.weights), "seconds": time.monotonic() - started}
    if recall is not None:
        figures |= {
            "task": recall.task,
            "trained_distance": recall.max_distance,
            "facts_per_segment": recall.facts_per_segment[1],
            "max_fact_gap": recall.max_fact_gap,
            "segment_length": run.model.segment_length,
            "num_slots": run.model.config.num_slots,
        }
    figures |= result.to_dict()
    output = Path(options.output or run.folder)
    write_json(output / RETENTION_FILE, figures)
    write_figure(output / RETENTION_FIGURE_FILE, figure)
    if options.json:
        print(json.dumps(figures))
    else:
        if isinstance(result, Recall):
            facts = "1 fact" if result.num_facts == 1 else f"{result.num_facts} facts"
            print(f"{figures['task']}, {facts}; longest distance of training: {figures['trained_distance']:,}")
        print(result.to_table())
        print(f"{figures['seconds']:,.1f} s; weights: {run.weights}")
        print(f"wrote {output / RETENTION_FILE} and {output / RETENTION_FIGURE_FILE}")


def _retention_of_facts(run: LoadedRun, config: RunConfig, options: Any) -> tuple[Recall, Any]:
    from memformer.evaluation.plots import draw_recall

    refuse_options(options, ("delays", "max_tokens", "num_lanes"), kind="on a recall task")
    data = prepare_data(config.data, tokenizer=run.tokenizer)
    assert isinstance(data, RecallData)
    if options.seed is not None:
        check_seed("seed", options.seed)
    recall = data.config
    longest = recall.max_distance
    distances = options.distances or doubling_distances(32 * longest)
    given = {
        "num_episodes": options.num_episodes,
        "questions_per_episode": options.questions,
        "seed": options.seed,
    }
    with SegmentProgress("reading on", max(distances)) as progress:
        found = measure_recall(
            run.model,
            data.validation,
            recall,
            distances=distances,
            num_facts=recall.num_facts[1] if options.num_facts is None else options.num_facts,
            progress=progress.advance_to,
            **{name: value for name, value in given.items() if value is not None},
        )
    return found, draw_recall(found, trained_distance=longest, segment_length=run.model.segment_length)


def _retention_of_documents(run: LoadedRun, config: RunConfig, options: Any) -> tuple[DocumentRetention, Any]:
    from memformer.evaluation.plots import draw_documents

    of_recall = ("distances", "num_facts", "facts_per_segment", "max_fact_gap", "num_episodes", "questions", "seed")
    refuse_options(options, of_recall, kind="on documents")
    max_tokens = positive(options, "max_tokens", default=200_000)
    num_lanes = positive(options, "num_lanes", default=8)
    data = prepare_data(config.data, tokenizer=run.tokenizer)
    assert isinstance(data, DocumentData)
    corpus = first_documents(data.validation, max_tokens)
    num_segments = int((-(-corpus.document_lengths // run.model.segment_length)).sum())
    with SegmentProgress("reading", num_segments) as progress:
        result = measure_documents(
            run.model, corpus, delays=options.delays, num_lanes=num_lanes, progress=progress.advance_to
        )
    return result, draw_documents(result)


def _with_options(recall: RecallConfig, options: Any) -> RecallConfig:
    """Return the task with the layout that the options ask for."""
    if options.max_fact_gap is not None:
        recall = dataclasses.replace(recall, max_fact_gap=options.max_fact_gap)
    if options.facts_per_segment is not None:
        recall = dataclasses.replace(recall, facts_per_segment=(options.facts_per_segment, options.facts_per_segment))
    return recall
