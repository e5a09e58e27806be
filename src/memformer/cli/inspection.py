"""The `memformer inspect` command."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

from memformer.cli.loading import load_run_of, open_given, prepare_data_of, run_config_of, source_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.cli.prompts import InputText, open_input
from memformer.cli.unknown_words import UnknownWords
from memformer.data import Corpus, PixelTokenizer, SourceConfig
from memformer.data.sources import locate_source_files
from memformer.errors import InputError
from memformer.evaluation.inspection import InspectionOptions, check_can_inspect, inspect_memory
from memformer.evaluation.streams import read_documents, read_stream
from memformer.rollout import Rollout
from memformer.training.run_data import DocumentData, RecallData
from memformer.training.run_folder import LoadedRun
from memformer.utils.checks import check_seed
from memformer.utils.files import check_can_write, user_path, write_text
from memformer.utils.progress import ProgressBar

PAGE_FILE = "inspect.html"
_PAGE_SUFFIXES = (".html", ".htm")
NUM_IMAGES = 4

INSPECT_HELP = """Show what the memory does while a model reads. Writes inspect.html, a page that needs no network.

The page shows how much of itself each slot keeps at each timestep (a slot is one vector of the memory, a timestep one
segment), what the slots take from which tokens, what each layer reads from which slot, how long a slot keeps a value,
the surprisal of each token with the memory intact and erased, and the passages in which the memory helped most.

It reads a text (--text), other documents (--data), or data of the run: the first held-out document, or images, or one
episode of a recall task. A text may be of any length and may come through a pipe: the page then holds evenly spaced
timesteps, or a window of them (--window), and says which. Its sums, slots and passages cover the whole text.

With --json, the data is printed instead, and the page is written only with --output.
The page needs the extra: pip install 'memformer-lm[inspect]'.

  memformer inspect runs/demo --text my_notes.txt
  cat huge.log | memformer inspect runs/demo --text - --output huge.html
  memformer inspect runs/demo --text my_notes.txt --window 100 140 --json
  memformer inspect runs/digits --num_documents 20
"""


def inspect_parser() -> ArgumentParser:
    """Return the parser of `memformer inspect`; an option that was not given is None."""
    parser = new_parser("inspect", INSPECT_HELP, "RUN [--text FILE | --data.kind KIND --data.path PATH] [options]")
    add_run_arguments(parser)
    parser.add_argument("--text", type=str, default=None, help="Text file to read; - reads stdin.")
    parser.add_argument(
        "--data",
        type=SourceConfig | None,
        default=None,
        help="Documents to read instead (keys: see --data.help).",
    )
    parser.add_argument(
        "--output", type=str, default=None, help=f"HTML file to write (.html). Default: {PAGE_FILE} in the run folder."
    )
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        default=None,
        help="First timestep to keep in full, and the timestep after the last one. Default: samples of all timesteps.",
    )
    numbers = (
        ("max_timesteps", "Timesteps to keep in full. Default: as many as fit 2 million weights, at most 128."),
        (
            "num_documents",
            f"Documents to read, with the run's data or --data. Default: 1, or {NUM_IMAGES} images.",
        ),
        ("num_passages", "Passages in which the memory helped most. Default: 10."),
        ("passage_tokens", "Tokens of a passage. Default: 16."),
        ("num_probes", "Times at which half-lives are measured; 0: not at all. Default: 4."),
        ("probe_timesteps", "Timesteps of each of these measurements. Default: 32."),
        ("seed", "Recall runs: seed of the episode. Default: 0."),
    )
    for name, text in numbers:
        parser.add_argument(f"--{name}", type=int | None, default=None, help=text)
    return parser


class _Source(NamedTuple):
    """Input of an inspection.

    Attributes:
        stream: The rollouts, of one row.
        description: A sentence about it.
        num_tokens: Number of predicted tokens; None if it is unknown.
    """

    stream: Iterator[Rollout]
    description: str
    num_tokens: int | None


def run_inspect(argv: list[str]) -> None:
    """Write a page about the memory of a run, or print its data.

    Raises:
        InputError: The run, the text or an option is invalid, or Plotly is missing.
    """
    from memformer.evaluation.inspection_page import check_can_render, render_page

    options = parse(inspect_parser(), argv, sections={"data": SourceConfig})
    inspection_options = _inspection_options(options)
    if options.text is not None:
        if options.data is not None:
            raise InputError("--text and --data are both given; give only one of them")
        refuse_options(options, ("num_documents", "seed"), kind="that reads --text")
    run = load_run_of(options)
    options.data = source_of(run, options, argv)
    check_can_inspect(run.model)
    output = run.folder / PAGE_FILE if options.output is None else user_path(options.output)
    writes_page = not options.json or options.output is not None
    if writes_page:
        _check_output(output, options)
        check_can_render()
    with (
        _open_source(run, options) as source,
        ProgressBar("reading", source.num_tokens, unit="token") as progress,
    ):
        inspection = inspect_memory(
            run.model,
            source.stream,
            tokenizer=run.tokenizer,
            options=inspection_options,
            progress=progress.advance_to,
        )
    if writes_page:
        write_text(output, render_page(inspection, title=run.folder.resolve().name, source=source.description))
    if options.json:
        print(json.dumps({"weights": str(run.weights), "source": source.description, **inspection.to_dict()}))
    else:
        print(inspection.to_table())
        print(f"wrote {output}")


def _check_output(output: Path, options: Any) -> None:
    """Check that the page can be written, and to no file that is read.

    Raises:
        InputError: It cannot, or the file is one that is read.
    """
    if output.suffix.lower() not in _PAGE_SUFFIXES:
        raise InputError(f"--output {output} must end in {_PAGE_SUFFIXES[0]}")
    check_can_write(output)
    if options.data is not None:
        inputs = [file.path for file in locate_source_files(options.data, section="data")]
    else:
        inputs = [] if options.text in (None, "-") else [user_path(options.text)]
    if output.exists() and any(file.exists() and output.samefile(file) for file in inputs):
        raise InputError(f"--output {output} is a file that is read; choose another file")


def _inspection_options(options: Any) -> InspectionOptions:
    fields = [field.name for field in dataclasses.fields(InspectionOptions) if field.name != "max_probed_slots"]
    return InspectionOptions(**{name: options[name] for name in fields if options[name] is not None})


@contextmanager
def _open_source(run: LoadedRun, options: Any) -> Iterator[_Source]:
    """Open the text, the documents or the episode to read.

    Yields:
        The source.

    Raises:
        InputError: It cannot be read, or does not fit the run.
    """
    with ExitStack() as stack:
        if options.text is not None:
            if isinstance(run.tokenizer, PixelTokenizer):
                raise InputError(f"--text does not apply to a run on images; {run.folder} reads pixels")
            prompt = stack.enter_context(open_input(options.text, option="--text "))
            name = "stdin" if options.text == "-" else options.text
            yield _Source(_text_rollouts(run, prompt, name), f"Read from {name}.", None)
        elif options.data is not None:
            yield _of_documents(run, open_given(run, options.data), options, "the given documents")
        elif run.run_config is None:
            text = "" if isinstance(run.tokenizer, PixelTokenizer) else "--text, or "
            raise InputError(f"{run.folder} has no data of its own; give {text}--data.kind and --data.path")
        else:
            yield _of_run(run, options)


def _of_run(run: LoadedRun, options: Any) -> _Source:
    data = prepare_data_of(run, run_config_of(run).data)
    if isinstance(data, RecallData):
        refuse_options(options, ("num_documents",), kind="on a recall task")
        return _of_episode(run, data, options)
    assert isinstance(data, DocumentData)
    return _of_documents(run, data.test, options, "the run's held-out documents")


def _of_documents(run: LoadedRun, corpus: Corpus, options: Any, name: str) -> _Source:
    refuse_options(options, ("seed",), kind="on documents")
    is_image = isinstance(run.tokenizer, PixelTokenizer)
    wanted = positive(options, "num_documents", default=NUM_IMAGES if is_image else 1)
    chosen = corpus.subset(range(min(wanted, corpus.num_documents)))
    stream = read_documents(chosen, segment_length=run.model.segment_length, bos_token_id=run.model.bos_token_id)
    description = f"Read the first {chosen.num_documents:,} of {corpus.num_documents:,} of {name}."
    return _Source(stream, description, chosen.num_tokens)


def _of_episode(run: LoadedRun, data: RecallData, options: Any) -> _Source:
    seed = 0 if options.seed is None else check_seed("seed", options.seed)
    description = (
        f"Read one episode of the recall task {data.config.task!r} (seed {seed}); only the answers are predicted."
    )
    episode = data.held_out_episode(run.model, seed=seed)
    return _Source(iter([episode]), description, episode.count_target_tokens())


def _text_rollouts(run: LoadedRun, prompt: InputText, name: str) -> Iterator[Rollout]:
    unknown = UnknownWords(run.tokenizer)

    def pieces() -> Iterator[NDArray[np.integer[Any]]]:
        for piece in prompt.pieces(run.tokenizer):
            unknown.add(piece)
            yield piece

    is_empty = True
    for rollout in read_stream(pieces(), segment_length=run.model.segment_length, bos_token_id=run.model.bos_token_id):
        is_empty = False
        yield rollout
    if is_empty:
        raise InputError(f"{name} is empty; an inspection needs a text of at least 1 token")
    unknown.warn_if_most(name)
