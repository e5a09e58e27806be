"""The `memformer score` command."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of
from memformer.cli.outside_values import OutsideValues
from memformer.cli.parsing import add_run_arguments, new_parser, parse
from memformer.cli.positions import take_up_to
from memformer.cli.prompts import InputText, open_input
from memformer.cli.saving import (
    Saving,
    add_saving_arguments,
    check_saving_options,
    check_session_file,
    check_whole_rows,
    saved_on_refusal,
)
from memformer.cli.score_output import ScoreOutput
from memformer.cli.scoring import Scoring, blocks_up_to
from memformer.cli.unfinished import warn_if_unfinished
from memformer.cli.unknown_words import UnknownWords
from memformer.data import PixelTokenizer
from memformer.data.lines import LineReader, TextPart
from memformer.errors import InputError
from memformer.evaluation.likelihood import content_unit
from memformer.training.run_folder import LoadedRun
from memformer.utils.checks import check_integer, check_number
from memformer.utils.files import user_path
from memformer.utils.ownership import owned_file
from memformer.utils.progress import ProgressBar
from memformer.utils.signals import Interrupted, Signals, signals_noted

NUM_CONTEXT_LINES = 2

SCORE_HELP = """Score a text: how surprising is each line to the model, given everything before it?

RUN is a run folder, or a folder from save_pretrained that also holds a tokenizer. FILE is one document, which may never
end (a pipe); - reads stdin. It is read once, in constant memory, and results are printed as soon as they are known.
The score of a line is the negative log-likelihood of the tokens that begin in it, in nats, and in bits per byte of the
line; its line end counts as a part of it. The sum of all tokens is what `memformer evaluate` measures on the same
document (without its end-of-document token, if the run has one: a stream may go on). Texts of lines are cut to 2,000
bytes. For a run on series, a line is a row, with one number for each column, and bits are per value.

--threshold needs a number that fits the model and the text: score a normal text first, and take a value above nearly
all of its lines. With it, the exit status is 0 if no line is above it, and 1 if there is any. As always, it is 2 for
an invalid input, and 128 + the signal's number after an interrupt.

--save_session writes the state to a file, at the end, on an interrupt and every few minutes. --load_session goes on
from it with the text that follows, also in the middle of a line: the runs print what one run would print. Their totals,
--top and exit status are about their own text. With --save_session a last line without a line end is taken as begun:
it is reported by the run that reads its end. After an interrupt or a kill, the same command with --resume goes on with
the rest of the same text; lines scored since the last save are printed again.

  memformer score runs/logs server.log --top 20
  tail -n +1 -F server.log | memformer score runs/logs - --threshold 3.5
  memformer score runs/logs today.log --threshold 3.5 > alerts || mail -s alerts me < alerts
  memformer score runs/logs monday.log --json --save_session logs.state > monday.jsonl
  memformer score runs/logs tuesday.log --json --load_session logs.state --save_session logs.state > tuesday.jsonl
"""


def score_parser() -> ArgumentParser:
    """Return the parser of `memformer score`."""
    parser = new_parser("score", SCORE_HELP, "RUN FILE|- [--per line|token|document] [options]")
    add_run_arguments(parser, json_help="Print JSON lines: one object for each line, token, or document.")
    parser.add_argument("file", type=str, help="Text to score; - reads stdin. Compressed content is decompressed.")
    parser.add_argument(
        "--per",
        choices=["line", "token", "document"],
        default=None,
        help="What to print a score of: every line, every token, or the whole text. Default: line; with --top or "
        "--threshold: only the lines that they choose.",
    )
    parser.add_argument(
        "--top",
        type=int | None,
        default=None,
        help="Print this many lines with the most bits per byte at the end, with their context.",
    )
    parser.add_argument(
        "--context",
        type=int | None,
        default=None,
        help=f"Lines before and after each line of --top. Default: {NUM_CONTEXT_LINES}.",
    )
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="Bits per byte (per value for a series). Print the lines above it (with --per line: mark them), and set "
        "the exit status to 1 if there is any.",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="Compile the reading with torch.compile. This takes up to a minute; small models then read faster.",
    )
    add_saving_arguments(parser, text="text")
    return parser


def run_score(argv: list[str]) -> int:
    """Score a text; return the exit status: 1 if a line is above the threshold, else 0.

    Raises:
        InputError: The run, the text or an option is invalid.
        Interrupted: A signal arrived; what was found so far was printed, and the session saved.
    """
    options = parse(score_parser(), argv)
    minutes = check_saving_options(options)
    _check_options(options)
    run = load_run_of(options)
    if isinstance(run.tokenizer, PixelTokenizer):
        raise InputError(f"{run.folder} is a run on images; memformer score reads text")
    file = None if options.save_session is None else user_path(options.save_session)
    with ExitStack() as stack:
        if file is not None:
            stack.enter_context(owned_file(file, option="--save_session"))
            check_session_file(options, file)
        signals = stack.enter_context(signals_noted())
        scoring = _start(run, options, file, minutes=minutes)
        output = ScoreOutput(options, run.tokenizer, goes_on=scoring.session.num_tokens[0] > 0)
        with saved_on_refusal(scoring, file):
            _score(scoring, run, options, output, signals)
        output.end(scoring)
        scoring.save()
    if signals.received:
        what_now = "" if file is None else f"; session saved to {file}, continue with --resume"
        num_bytes = scoring.position.length
        raise Interrupted(signals.received[0], f"{num_bytes:,} bytes scored{what_now}")
    return int(options.threshold is not None and scoring.totals.most_bits > options.threshold)


def _check_options(options: Any) -> None:
    """Check the options of the results before anything is loaded.

    Raises:
        InputError: One of them is out of range, or contradicts another one.
    """
    if options.top is not None:
        check_integer("top", options.top, 1)
    if options.context is not None:
        check_integer("context", options.context, 0)
        if options.top is None:
            raise InputError("--context is given without --top; only the lines of --top are printed with their context")
    if options.threshold is not None:
        check_number("threshold", options.threshold, minimum=0)
        if options.per in {"token", "document"}:
            raise InputError(f"--threshold is about lines; it cannot be given with --per {options.per}")


def _start(run: LoadedRun, options: Any, file: Path | None, *, minutes: float) -> Scoring:
    """Return a new scoring, or the one that continues a session."""
    source = file if options.resume else options.load_session
    if source is None:
        session = run.session(compiled=options.compiled)
    else:
        source = user_path(source)
        session = run.load_session(source, compiled=options.compiled)
        if not options.resume:
            check_whole_rows(session, run.tokenizer, source)
    context = NUM_CONTEXT_LINES if options.context is None else options.context
    saving = Saving(session, file, minutes=minutes)
    unit = content_unit(run.tokenizer)
    scoring = Scoring(session, saving, top=options.top or 0, context=context, unit=unit)
    if source is not None:
        scoring.restore(source, resumes=options.resume)
        if not options.resume:
            warn_if_unfinished(source)
    return scoring


def _score(scoring: Scoring, run: LoadedRun, options: Any, output: ScoreOutput, signals: Signals) -> None:
    """Score the text until a signal arrives, and print what is known."""
    with (
        open_input(options.file, option="FILE ", while_waiting=scoring.save_if_due) as text,
        ProgressBar("scoring", text.size, unit="byte") as progress,
    ):
        goes_on = scoring.session.num_tokens[0] > scoring.totals.num_tokens
        # The tokens of an outside tokenizer depend on the whole text, which is read again from its beginning.
        held = scoring.held_before if run.tokenizer.kind == "pretrained" else scoring.held
        reader = LineReader(run.tokenizer, text.stream, name=text.name, held=held, goes_on=goes_on)
        parts = reader.parts(ends_line=options.save_session is None)
        start = scoring.position
        unknown, outside = UnknownWords(run.tokenizer), OutsideValues(run.tokenizer, text.name)

        def bytes_scored() -> int:
            # Before decompression, of which only the bytes read are known: those scored are about the same share.
            return text.num_bytes_read * scoring.position.length // max(start.length + reader.num_bytes_read, 1)

        for number, part in enumerate(signals.until_signalled(_from(scoring, parts, text, run), waits=True)):
            if start.length and not number:
                progress.begin_at(bytes_scored())
            unknown.add(part.token_ids)
            outside.add(part.content)
            first_line = scoring.sums.line.number
            nll, lines = scoring.score(part)
            output.tokens(part, nll, first_line=first_line)
            output.lines(lines)
            # Printed before it is saved, so that no line is lost by a kill.
            scoring.save_if_due()
            if output.leaves_terminal_free:
                progress.advance_to(bytes_scored())
    unknown.warn_if_most(text.name)
    if not signals.received:
        scoring.is_finished = True
        scoring.held = reader.held
        if options.save_session is None:
            output.lines(scoring.end_line())


def _from(scoring: Scoring, parts: Iterator[TextPart], text: InputText, run: LoadedRun) -> Iterator[TextPart]:
    """Yield the parts of a text from where it was scored up to, at which a part ended."""
    before: Iterator[bytes]
    if run.tokenizer.kind == "pretrained":
        # The first part begins with what an earlier text has left, which the position does not count.
        starts = chain([len(scoring.held_before)], repeat(0))
        before = (part.content[start:] for part, start in zip(parts, starts, strict=False))
    else:
        before = blocks_up_to(scoring.position.length, text.stream)
    take_up_to(scoring.position, before, text="text", unit="bytes", done="scored", ends_part=True)
    yield from parts
