"""The `memformer retention` command."""

import dataclasses
import json
import time
from typing import Any

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of, prepare_data_of, run_config_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.data import (
    RecallConfig,
)
from memformer.errors import InputError
from memformer.evaluation.document_retention import DocumentRetention, measure_documents
from memformer.evaluation.likelihood import content_unit
from memformer.evaluation.recall import Recall, measure_recall
from memformer.generation.session import Session
from memformer.models.memory_encoder import MemoryEncoder
from memformer.training.config import RunConfig
from memformer.training.run_data import (
    DocumentData,
    RecallData,
    doubling_distances,
    first_documents,
)
from memformer.training.run_folder import (
    RUN_CONFIG_FILE,
    LoadedRun,
)
from memformer.utils.checks import check_seed
from memformer.utils.files import check_can_write, user_path, write_json
from memformer.utils.progress import ProgressBar
from memformer.utils.signals import Interrupted, Signals, signals_noted
from memformer.utils.words import counted

RETENTION_FILE = "retention.json"
RETENTION_FIGURE_FILE = "retention.png"

RETENTION_HELP = """Measure how long the memory of a run retains information. Writes retention.json and retention.png.

A segment is the fixed number of tokens that the model reads at a time; the memory is updated once per segment.

For a run on a recall task (facts, filler segments, then questions about the facts): accuracy against the distance from
the last fact to the question, in segments, up to distances far beyond those in training.

For a run on documents: bits per token by position in the document, with the memory intact and erased; and bits per byte
when the current memory is replaced by the memory from d segments earlier (--delays). The latter separates the gain
from the last d segments from the gain from all earlier ones. Only tokens with at least
as many segments before them as the largest delay are counted. Their bytes are estimated from the mean number of bytes
per token over all tokens.

  memformer retention runs/recall
  memformer retention runs/recall --distances 1 100 10000 60000 --num_facts 8 --num_episodes 16
  memformer retention runs/demo --delays 1 4 16 64 --max_tokens 1000000 --output notes/demo --json
"""


def retention_parser() -> ArgumentParser:
    """Return the parser of `memformer retention`; an option that was not given is None."""
    parser = new_parser("retention", RETENTION_HELP, "RUN [options] [--output FOLDER] [--json]")
    add_run_arguments(parser)
    parser.add_argument("--output", type=str, default=None, help="Folder to write to. Default: the run folder.")
    recall, documents = "Recall runs: ", "Document runs: "
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=None,
        help=recall
        + "segments from the last fact to the question. Default: 1, 2, 4, ..., up to 32 times the longest distance "
        "in training.",
    )
    numbers = (
        (
            "num_facts",
            recall
            + "facts per episode (one sequence of facts, filler and questions). Default: the maximum in training.",
        ),
        ("facts_per_segment", recall + "facts per segment. Default: the maximum in training."),
        (
            "max_fact_gap",
            recall + "maximum number of filler segments between two segments with facts. Default: as in training.",
        ),
        ("num_episodes", recall + "number of episodes, read in parallel. Default: 64."),
        ("questions", recall + "maximum number of different questions per episode and distance. Default: 4."),
        ("seed", recall + "seed of the episodes. Default: 0."),
        (
            "max_tokens",
            documents + "held-out tokens to read (of data.test if the run has it), rounded up to whole documents. "
            "Default: 200000.",
        ),
        ("num_lanes", documents + "documents read in parallel (the batch size). Default: 8."),
    )
    for name, text in numbers:
        parser.add_argument(f"--{name}", type=int | None, default=None, help=text)
    parser.add_argument(
        "--delays",
        type=int,
        nargs="+",
        default=None,
        help=documents + "ages of the memory that is read, in segments. Default: 0, 1, 2, 4, ..., 32, limited by the "
        "length of the documents.",
    )
    return parser


def run_retention(argv: list[str]) -> None:
    """Measure how long a run's memory retains information; write the results as JSON and as a plot.

    Raises:
        InputError: The run or an option is invalid, or an option applies to the other kind of run only.
        Interrupted: A signal arrived while facts were recalled; the distances measured before were written.
    """
    from memformer.evaluation.plots import write_figure

    options = parse(retention_parser(), argv)
    output = user_path(options.run if options.output is None else options.output)
    run = load_run_of(options)
    if run.run_config is None:
        raise InputError(
            f"{run.folder} has no {RUN_CONFIG_FILE}, which defines the data to measure on; give a run folder"
        )
    for name in (RETENTION_FILE, RETENTION_FIGURE_FILE):
        check_can_write(output / name)
    config = run_config_of(run)
    recall = config.data.recall
    if recall is not None:
        recall = _with_options(recall, options)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, recall=recall))
    started = time.monotonic()
    result: DocumentRetention | Recall
    if recall is None:
        result, figure = _retention_of_documents(run, config, options)
    else:
        with signals_noted() as signals:
            result, figure = _retention_of_facts(run, config, options, signals)
    figures: dict[str, Any] = {"weights": str(run.weights), "seconds": time.monotonic() - started}
    if recall is not None:
        figures |= {
            "task": recall.task,
            "trained_distance": recall.max_distance,
            "facts_per_segment": recall.facts_per_segment[1],
            "max_fact_gap": recall.max_fact_gap,
            "segment_length": run.model.segment_length,
            "num_slots": run.model.config.num_slots if isinstance(run.model, MemoryEncoder) else None,
            "state_bytes": Session(run.model).state_bytes,
        }
    figures |= result.to_dict()
    write_json(output / RETENTION_FILE, figures)
    write_figure(output / RETENTION_FIGURE_FILE, figure)
    if options.json:
        print(json.dumps(figures))
    else:
        if isinstance(result, Recall):
            facts = counted(result.num_facts, "fact")
            print(f"{figures['task']}, {facts}; longest distance in training: {figures['trained_distance']:,}")
        print(result.to_table())
        print(f"{figures['seconds']:,.1f} s; weights: {run.weights}")
        print(f"wrote {output / RETENTION_FILE} and {output / RETENTION_FIGURE_FILE}")
    if isinstance(result, Recall) and signals.received:
        raise Interrupted(signals.received[0], f"{counted(len(result.points), 'distance')} measured and written")


def _retention_of_facts(run: LoadedRun, config: RunConfig, options: Any, signals: Signals) -> tuple[Recall, Any]:
    """Return the results and their figure; if a signal arrives, of the distances that were measured before.

    Raises:
        InputError: An option is invalid.
        Interrupted: A signal arrived before anything was measured.
    """
    from memformer.evaluation.plots import draw_recall

    refuse_options(options, ("delays", "max_tokens", "num_lanes"), kind="on a recall task")
    data = prepare_data_of(run, config.data)
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
    with ProgressBar("reading", max(distances), unit="segment") as progress:
        found = measure_recall(
            run.model,
            data.validation,
            recall,
            distances=distances,
            num_facts=recall.num_facts[1] if options.num_facts is None else options.num_facts,
            progress=progress.advance_to,
            is_stopped=lambda: bool(signals.received),
            **{name: value for name, value in given.items() if value is not None},
        )
    if not found.points:
        raise Interrupted(signals.received[0], "nothing was measured yet")
    return found, draw_recall(found, trained_distance=longest, segment_length=run.model.segment_length)


def _retention_of_documents(run: LoadedRun, config: RunConfig, options: Any) -> tuple[DocumentRetention, Any]:
    from memformer.evaluation.plots import draw_documents

    of_recall = ("distances", "num_facts", "facts_per_segment", "max_fact_gap", "num_episodes", "questions", "seed")
    refuse_options(options, of_recall, kind="on documents")
    max_tokens = positive(options, "max_tokens", default=200_000)
    num_lanes = positive(options, "num_lanes", default=8)
    data = prepare_data_of(run, config.data)
    assert isinstance(data, DocumentData)
    corpus = first_documents(data.test, max_tokens)
    num_segments = int((-(-corpus.document_lengths // run.model.segment_length)).sum())
    with ProgressBar("reading", num_segments, unit="segment") as progress:
        result = measure_documents(
            run.model,
            corpus,
            delays=options.delays,
            num_lanes=num_lanes,
            unit=content_unit(run.tokenizer),
            progress=progress.advance_to,
        )
    return result, draw_documents(result)


def _with_options(recall: RecallConfig, options: Any) -> RecallConfig:
    """Return the task with the options' episode layout."""
    if options.max_fact_gap is not None:
        recall = dataclasses.replace(recall, max_fact_gap=options.max_fact_gap)
    if options.facts_per_segment is not None:
        recall = dataclasses.replace(recall, facts_per_segment=(options.facts_per_segment, options.facts_per_segment))
    return recall
