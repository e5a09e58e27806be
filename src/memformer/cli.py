"""The command `memformer`: parse, build, call, report.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 2 a mistake that the one line on stderr
explains, 128 + the signal's number if a run was interrupted (it saved a checkpoint first).

What a command alone needs and is slow to import (sharding, plots: a second and a half) it imports itself, so that the
others, help and refusals begin sooner.
"""

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memformer import commands
from memformer.config import MemformerConfig, check_seed
from memformer.data import NUM_TASK_TOKENS, PixelTokenizer, RecallConfig, Tokenizer, load_tokenizer, save_tokenizer
from memformer.data.tokenizers import encode_stream
from memformer.document_retention import DocumentRetention, measure_documents
from memformer.errors import InputError
from memformer.evaluation import Result, evaluate
from memformer.files import check_can_write, write_json
from memformer.generation import Session
from memformer.interruption import Interrupted, Signals, signals_noted
from memformer.models import LanguageModel, build_model
from memformer.progress import SegmentProgress, print_warning
from memformer.retention import Recall, measure_recall
from memformer.sampling import check_sampling
from memformer.training.checkpoint import checkpoints_newest_first
from memformer.training.config import DataConfig, RunConfig, check_threads
from memformer.training.processes import Processes, exit_process, processes_started, were_restarted
from memformer.training.run import (
    CHECKPOINTS,
    RUN_CONFIG_FILE,
    LoadedRun,
    check_run_folder,
    choose_device,
    load_run,
    read_run_config,
    write_run_config,
)
from memformer.training.run_data import (
    DocumentData,
    RecallData,
    doubling_distances,
    first_documents,
    open_corpus,
    prepare_data,
)

RETENTION_FILE = "retention.json"
RETENTION_FIGURE_FILE = "retention.png"
# Of a prompt, read at a time: an interrupt waits for as many.
_PIECE_TOKENS = 4096

USAGE = """usage: memformer COMMAND ...

Sequence models that read arbitrarily long input with a memory of fixed size (arXiv 2010.06891).

  memformer train CONFIG.yaml [--key value ...]   train a model, or go on with --resume
  memformer evaluate RUN                          perplexity and bits, with the memory and with it erased
  memformer retention RUN                         how long the memory holds, and what old memory is worth
  memformer generate RUN                          continue a text of any length, or draw images
  memformer report RUN                            write a page about a run
  memformer reproduce TABLE                       train and write one of the paper's tables

`memformer COMMAND --help` explains each with examples.
"""


def entry_point() -> None:
    """Run the command with the process's arguments, and exit with its status."""
    exit_process(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"memformer {commands.version()}")
        return 0
    try:
        _handler(argv[0])(list(argv[1:]))
    except InputError as error:
        return _refuse(str(error))
    except Interrupted as interrupted:
        print(f"memformer: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing more can be said.
        sys.stderr.close()
        return 141
    except OSError as error:
        # Not a file of ours, those raise SaveError: the log on a full disk, say.
        return _refuse(str(error))
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _handler(command: str) -> Callable[[list[str]], None]:
    handlers = {
        "train": run_train,
        "evaluate": run_evaluate,
        "retention": run_retention,
        "generate": run_generate,
        "report": run_report,
        "reproduce": run_reproduce,
    }
    if command not in handlers:
        raise InputError(f"unknown command {command!r}; the commands are {', '.join(handlers)}")
    return handlers[command]


def _refuse(message: str) -> int:
    # Messages of libraries may have several lines; a mistake is one.
    print(f"memformer: error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return 2


def run_train(argv: list[str]) -> None:
    """Train, or go on training, and report the evaluation on held-out documents.

    Raises:
        InputError: The config or the data is wrong, or the run folder holds another run.
    """
    if not argv or argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise InputError("memformer train needs a config first: memformer train CONFIG.yaml [--key value ...]")
        commands.parse(commands.train_parser(commands.find_model_type({}, argv, owner="")), argv)
    config, options = commands.parse_run_config(argv)
    device = _prepare_torch(config.device, config.threads)
    with processes_started(device.type) as processes:
        _train(config, options, device, processes)


def _train(config: RunConfig, options: Any, device: torch.device, processes: Processes) -> None:
    from memformer.report import write_report
    from memformer.training.loop import check_same_run, train

    folder = Path(config.folder)
    check_run_folder(folder)
    started_before = any(checkpoints_newest_first(folder / CHECKPOINTS))
    # Nobody writes before everybody has looked.
    processes.wait_for_all()
    resume = options.resume or (started_before and were_restarted())
    if started_before and not resume:
        raise InputError(f"{folder} already holds a run; go on with --resume, or choose another --folder")
    tokenizer = None
    if resume:
        saved = read_run_config(folder)
        tokenizer = load_tokenizer(folder)
        check_same_run(saved, dataclasses.replace(config, model=_fit_vocabulary(config, tokenizer)))
    if processes.is_first:
        print(f"preparing the data for {folder}", file=sys.stderr)
        data = prepare_data(config.data, tokenizer=tokenizer)
    processes.wait_for_all()
    if not processes.is_first:
        # From what the first one has put into the cache.
        data = prepare_data(config.data, tokenizer=tokenizer)
    config = dataclasses.replace(config, model=_fit_vocabulary(config, data.tokenizer))
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(device)
    if processes.is_first:
        print(f"{model.num_parameters:,} parameters; {data.describe()}", file=sys.stderr)
        save_tokenizer(data.tokenizer, folder)
        write_run_config(folder, config.to_dict())
    result = train(config, data, model, resume=resume, processes=processes)
    if result is None:
        return
    summary = write_report(folder)
    if options.json:
        print(json.dumps({"run": str(folder), **result.to_dict()}))
    else:
        print(result.to_table())
        print(f"run folder: {folder}; open {summary}")


def run_evaluate(argv: list[str]) -> None:
    """Evaluate a run on what it holds out, or on other documents.

    Raises:
        InputError: The run or the data is wrong.
    """
    options = commands.parse(commands.evaluate_parser(), argv)
    num_lanes = _positive(options, "num_lanes", default=8)
    run = _load_run(options)
    result: Result
    if options.data is None:
        run_config = _run_config(run)
        if run_config.data.recall is not None:
            _refuse_options(options, ("num_lanes",), kind="on a recall task")
        data = prepare_data(run_config.data, tokenizer=run.tokenizer)
        training = dataclasses.replace(run_config.training, num_lanes=num_lanes)
        started = time.monotonic()
        result = data.evaluate(run.model, training, is_final=True)
    else:
        data_config = DataConfig() if run.run_config is None else _run_config(run).data
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


def run_retention(argv: list[str]) -> None:
    """Measure how long a run's memory holds, and write the figures and a picture of them.

    Raises:
        InputError: The run or an option is wrong, or an option is for the other kind of run.
    """
    from memformer.retention_plot import write_figure

    options = commands.parse(commands.retention_parser(), argv)
    if options.output is not None:
        check_can_write(Path(options.output) / RETENTION_FILE)
    run = _load_run(options)
    if run.run_config is None:
        raise InputError(
            f"{run.folder} has no {RUN_CONFIG_FILE}, which tells what to measure on; a run folder is needed"
        )
    config = _run_config(run)
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
    from memformer.retention_plot import draw_recall

    _refuse_options(options, ("delays", "max_tokens", "num_lanes"), kind="on a recall task")
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
    from memformer.retention_plot import draw_documents

    of_recall = ("distances", "num_facts", "facts_per_segment", "max_fact_gap", "num_episodes", "questions", "seed")
    _refuse_options(options, of_recall, kind="on documents")
    max_tokens = _positive(options, "max_tokens", default=200_000)
    num_lanes = _positive(options, "num_lanes", default=8)
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


def _positive(options: Any, name: str, *, default: int) -> int:
    """Return an option, or its default where it was not given.

    Raises:
        InputError: It is below 1.
    """
    value: int = default if options[name] is None else options[name]
    if value < 1:
        raise InputError(f"{name} ({value}) must be at least 1")
    return value


def _refuse_options(options: Any, names: Sequence[str], *, kind: str) -> None:
    for name in names:
        if options[name] is not None:
            raise InputError(f"--{name} has no meaning for a run {kind}")


def run_generate(argv: list[str]) -> None:
    """Continue a text, or draw images.

    Raises:
        InputError: The run, the prompt or an option is wrong.
        Interrupted: A signal arrived; the session that was to be saved is.
    """
    options = commands.parse(commands.generate_parser(), argv)
    sampling = _sampling_options(options)
    run = _load_run(options)
    if isinstance(run.tokenizer, PixelTokenizer):
        if options.compiled:
            raise InputError("--compiled has no meaning for a run on images")
        _draw(run.model, run.tokenizer, options, sampling)
        return
    _refuse_options(options, ("output", "num_images"), kind="on text")
    if options.load_session is None:
        session = Session(run.model, compiled=options.compiled)
    else:
        session = Session.load(options.load_session, model=run.model, compiled=options.compiled)
    if options.save_session is None:
        done = _go_on(session, run.tokenizer, options, sampling, Signals())
    else:
        file = Path(options.save_session)
        check_can_write(file)
        # What was read may have taken hours: a signal ends the reading, and the state is saved nevertheless.
        with signals_noted() as signals:
            done = _go_on(session, run.tokenizer, options, sampling, signals)
            session.save(file)
        if signals.received:
            read, new = done["prompt_tokens"], len(done["token_ids"])
            raise Interrupted(
                signals.received[0], f"{read:,} tokens read and {new:,} generated; their session is {file}"
            )
    print(json.dumps(done) if options.json else "")


def _go_on(
    session: Session, tokenizer: Tokenizer, options: Any, sampling: dict[str, Any], signals: Signals
) -> dict[str, Any]:
    """Read the prompt and, unless it is for JSON, print what follows, until a signal; return what was done."""
    prompt_tokens = 0
    for part in signals.until_signalled(_pieces(_read_prompt(options, tokenizer)), waits=True):
        session.feed(part)
        prompt_tokens += len(part)
    ids: list[int] = []
    num_tokens = commands.NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    steps = signals.until_signalled(session.stream(num_tokens, **sampling))
    text = ""
    for piece in tokenizer.decode_stream(_noted((step[0] for step in steps), ids)):
        text += piece
        if not options.json:
            print(piece, end="", flush=True)
    return {"prompt_tokens": prompt_tokens, "token_ids": ids, "text": text, "state_bytes": session.state_bytes}


def _pieces(parts: Iterator[NDArray[np.integer[Any]]]) -> Iterator[NDArray[np.integer[Any]]]:
    """Cut parts, so that none takes long to read."""
    for part in parts:
        yield from (part[start : start + _PIECE_TOKENS] for start in range(0, len(part), _PIECE_TOKENS))


def run_report(argv: list[str]) -> None:
    """Write a page about a run.

    Raises:
        InputError: The folder holds no run.
    """
    from memformer.report import write_report

    options = commands.parse(commands.report_parser(), argv)
    summary = write_report(Path(options.run))
    print(json.dumps({"summary": str(summary)}) if options.json else summary)


def run_reproduce(argv: list[str]) -> None:
    """Train the rows of a table, and write it.

    Raises:
        InputError: There is no such table, or runs failed.
    """
    from memformer.reproduction.command import reproduce

    own = argv[: argv.index("--")] if "--" in argv else argv
    options = commands.parse(commands.reproduce_parser(), own)
    print(reproduce(options, argv[len(own) + 1 :]))


def _load_run(options: Any) -> LoadedRun:
    """Load the run that the options name, on their device; without --threads it uses as many as it trained with."""
    device = _prepare_torch(options.device, options.threads)
    run = load_run(
        Path(options.run), which=options.checkpoint, device=device, num_slots=options.num_slots, warn=print_warning
    )
    trained_with = None if run.run_config is None else _run_config(run).threads
    if options.threads is None and trained_with is not None:
        torch.set_num_threads(trained_with)
    return run


def _prepare_torch(device: str, threads: int | None) -> torch.device:
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    return choose_device(device)


def _fit_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> Any:
    default = type(config.model)().vocab_size
    if config.model.vocab_size not in {default, tokenizer.vocab_size}:
        raise InputError(
            f"model.vocab_size ({config.model.vocab_size}) contradicts the data's tokenizer of "
            f"{tokenizer.vocab_size} tokens; leave it out"
        )
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    if isinstance(model, MemformerConfig) and config.data.multitask is not None:
        num_special_tokens = max(model.num_special_tokens, NUM_TASK_TOKENS)
        model = dataclasses.replace(model, num_special_tokens=num_special_tokens)
    return model


def _run_config(run: LoadedRun) -> RunConfig:
    if run.run_config is None:
        raise InputError(f"{run.folder} has no held-out documents of its own; give --data.kind and --data.path")
    return commands.parse_run_config([str(run.folder)])[0]


def _sampling_options(options: Any) -> dict[str, Any]:
    """Return the options of sampling, checked before anything is loaded or read.

    Raises:
        InputError: One is out of its range.
    """
    check_sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.max_new_tokens is not None and options.max_new_tokens < 0:
        raise InputError(f"max_new_tokens ({options.max_new_tokens}) must be at least 0")
    if options.seed is not None:
        check_seed("seed", options.seed)
    return {key: options[key] for key in ("temperature", "top_k", "top_p", "seed")}


def _read_prompt(options: Any, tokenizer: Tokenizer) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the prompt's token ids part by part: it may be longer than what fits in memory.

    Raises:
        InputError: It cannot be read, or two are given.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise InputError("--prompt and --prompt_file are both given; one prompt is read")
    with contextlib.ExitStack() as stack:
        stream: Any  # io.BufferedIOBase, which typeshed calls something else
        if options.prompt_file == "-":
            stream, name = sys.stdin.buffer, "stdin"
        elif options.prompt_file is not None:
            name = options.prompt_file
            try:
                stream = stack.enter_context(Path(name).open("rb"))
            except OSError as error:
                raise InputError(f"prompt file {name} cannot be read: {error.strerror or error}") from error
        else:
            # Bytes of the command line that are not UTF-8 arrive as surrogates; they are given back as they were.
            stream, name = io.BytesIO((options.prompt or "").encode("utf-8", "surrogateescape")), "prompt"
        yield from encode_stream(tokenizer, stream, name=name)


def _draw(model: LanguageModel, tokenizer: PixelTokenizer, options: Any, sampling: dict[str, Any]) -> None:
    from memformer.training.samples import NUM_IMAGES, sample_images, write_image_grid

    text_only = ("prompt", "prompt_file", "load_session", "save_session", "max_new_tokens")
    _refuse_options(options, text_only, kind="on images")
    num_images = _positive(options, "num_images", default=NUM_IMAGES)
    output = Path(options.output or "images.png")
    check_can_write(output)
    images = sample_images(model, tokenizer, num_images, **sampling)
    write_image_grid(output, images, tokenizer=tokenizer)
    print(json.dumps({"output": str(output), "images": images.tolist()}) if options.json else f"wrote {output}")


def _noted(ids: Any, into: list[int]) -> Any:
    for token in ids:
        into.append(token)
        yield token
