"""The `memformer generate` command."""

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memformer.cli.loading import load_run_of
from memformer.cli.parsing import add_run_arguments, new_parser, parse, positive, refuse_options
from memformer.cli.positions import Position
from memformer.cli.prompts import open_prompt
from memformer.cli.reading import Reading, saved_position, skip_to
from memformer.cli.saving import (
    add_saving_arguments,
    check_saving_options,
    check_session_file,
    check_whole_rows,
    saved_on_refusal,
)
from memformer.cli.scoring import held_bytes
from memformer.cli.unfinished import warn_if_unfinished
from memformer.cli.unknown_words import UnknownWords
from memformer.data import BinTokenizer, PixelTokenizer, Tokenizer
from memformer.data.outside_tokenizers import LAST_TOKENS, decode_after, stand_in
from memformer.data.tokenizer_training import has_tokenizer
from memformer.errors import InputError
from memformer.generation.sampling import check_sampling
from memformer.generation.session import Session
from memformer.models import LanguageModel
from memformer.training.run_folder import LoadedRun
from memformer.training.samples import NUM_IMAGES, allowed_tokens
from memformer.utils.checks import check_integer, check_seed
from memformer.utils.files import check_can_write, user_path
from memformer.utils.ownership import owned_file
from memformer.utils.progress import ProgressBar, print_warning
from memformer.utils.signals import Interrupted, Signals, signals_noted

NEW_TOKENS = 500

GENERATE_HELP = """Generate a continuation of a prompt, or sample images.

RUN is a run folder, or a folder from save_pretrained that also holds a tokenizer. The prompt may be arbitrarily long:
it is read segment by segment into the memory, whose size is fixed. New text is streamed to stdout; it ends at the
end of the document if the run was trained with data.end_of_document. --save_session
writes the state after the last token (memory and current segment) to a file; --load_session continues from it. The
file is also written every few minutes while the prompt is read: if the reading was interrupted or killed, the same
command with --resume goes on with the rest of the prompt.
For a model trained on images, a grid of samples is written as a PNG file instead.

  memformer generate runs/demo --prompt "import os"
  cat chapters/*.txt | memformer generate runs/demo --prompt_file - --temperature 0.8
  memformer generate runs/demo --prompt_file diary.txt --save_session diary.session
  memformer generate runs/demo --prompt_file diary.txt --save_session diary.session --resume
  memformer generate runs/demo --load_session diary.session --prompt " And then"
  memformer generate runs/digits --output digits.png --num_images 36
"""


def generate_parser() -> ArgumentParser:
    """Return the parser of `memformer generate`."""
    parser = new_parser("generate", GENERATE_HELP, "RUN [--prompt TEXT | --prompt_file FILE] [options]")
    add_run_arguments(parser)
    parser.add_argument("--prompt", type=str, default=None, help="Text to continue.")
    parser.add_argument("--prompt_file", type=str, default=None, help="File with the text to continue; - reads stdin.")
    parser.add_argument(
        "--max_new_tokens",
        type=int | None,
        default=None,
        help=f"Number of tokens to generate. Default: {NEW_TOKENS}, or for a series so many more that a row is whole.",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="Sampling temperature: below 1 favours likely tokens, 0 always takes the likeliest (greedy decoding).",
    )
    parser.add_argument("--top_k", type=int | None, default=None, help="Sample from the k likeliest tokens only.")
    parser.add_argument(
        "--top_p",
        type=float | None,
        default=None,
        help="Nucleus sampling: sample from the likeliest tokens whose probabilities sum to top_p.",
    )
    parser.add_argument(
        "--seed",
        type=int | None,
        default=None,
        help="Seed of the random generator; the same seed gives the same result.",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="Compile reading and decoding with torch.compile. This takes up to a minute; afterwards, small models "
        "read two to six times and decode more than twice as fast.",
    )
    add_saving_arguments(parser, text="prompt")
    parser.add_argument(
        "--num_images", type=int | None, default=None, help=f"Images only: number of samples. Default: {NUM_IMAGES}."
    )
    parser.add_argument("--output", type=str, default=None, help="Images only: PNG file to write. Default: images.png.")
    return parser


def run_generate(argv: list[str]) -> None:
    """Generate a continuation of a prompt, or sample images.

    Raises:
        InputError: The run, the prompt or an option is invalid.
        Interrupted: A signal arrived while --save_session was given; the session was saved.
    """
    options = parse(generate_parser(), argv)
    sampling = _sampling_options(options)
    minutes = check_saving_options(options)
    run = load_run_of(options)
    if isinstance(run.tokenizer, PixelTokenizer):
        _draw(run.model, run.tokenizer, options, sampling)
        return
    is_bare = not has_tokenizer(run.folder)
    advice = f": {run.folder} has no tokenizer, so its token ids are read as bytes" if is_bare else ""
    refuse_options(options, ("output", "num_images"), kind=f"on text{advice}")
    signals = Signals()
    if options.save_session is None:
        reading = _start_reading(run, options, None, minutes=minutes)
        done = _continue(reading, run.tokenizer, options, sampling, signals)
    else:
        file = user_path(options.save_session)
        # Reading a long prompt may take hours, so a signal ends the reading but the session is still saved.
        with owned_file(file, option="--save_session"), signals_noted() as signals:
            check_session_file(options, file)
            reading = _start_reading(run, options, file, minutes=minutes)
            with saved_on_refusal(reading, file):
                done = _continue(reading, run.tokenizer, options, sampling, signals)
            reading.save()
    # Also after a signal: the session has moved past the new text, which nobody would see otherwise.
    print(json.dumps(done) if options.json else "")
    if options.save_session is not None and reading.session.stop_token_ids.intersection(done["token_ids"][-1:]):
        print_warning(
            f"the document has ended: {file} holds the state after its end, from which the model has not learned to go "
            "on"
        )
    if signals.received:
        read, new = done["prompt_tokens"], len(done["token_ids"])
        option = f"--load_session {file}" if reading.is_finished else "--resume"
        raise Interrupted(
            signals.received[0],
            f"{read:,} tokens read and {new:,} generated; session saved to {file}, continue with {option}",
        )


def _start_reading(run: LoadedRun, options: Any, file: Path | None, *, minutes: float) -> Reading:
    """Return the session that reads the prompt: a new one, or a saved one.

    Raises:
        InputError: A session is to be resumed that was not reading a prompt.
    """
    source = file if options.resume else options.load_session
    if source is None:
        return Reading(run.session(compiled=options.compiled), file, minutes=minutes, start=Position())
    source = user_path(source)
    session = run.load_session(source, compiled=options.compiled)
    if options.resume:
        position = saved_position(source)
        if position is None:
            raise InputError(
                f"{source} is not in the middle of a prompt, so there is no reading to resume; "
                "continue the session with --load_session instead of --resume"
            )
        return Reading(session, file, minutes=minutes, start=position)
    if options.prompt is not None or options.prompt_file is not None:
        check_whole_rows(session, run.tokenizer, source)
    if count := held_bytes(source):
        print_warning(
            f"{source} has not read the last {count:,} bytes of a text that was scored: they begin a line, which "
            "memformer score reads when its end arrives"
        )
    warn_if_unfinished(source)
    return Reading(session, file, minutes=minutes, start=Position())


def _continue(
    reading: Reading, tokenizer: Tokenizer, options: Any, sampling: dict[str, Any], signals: Signals
) -> dict[str, Any]:
    """Read the prompt and generate until a signal arrives; return the result.

    Without --json the new text is printed as it is generated.
    """
    session = reading.session
    if not options.resume:  # a reading is saved anywhere, but a prompt ends with a row
        _num_new_tokens(session, tokenizer, options.max_new_tokens)  # refuses here, before hours of reading
    with (
        open_prompt(options.prompt, options.prompt_file, while_waiting=reading.save_if_due) as prompt,
        ProgressBar("reading", prompt.size, unit="byte") as progress,
    ):
        last: list[int] = []
        goes_on = session.num_tokens[0] > reading.position.length
        pieces = prompt.pieces(tokenizer, goes_on=goes_on)
        parts, unknown = skip_to(reading.position, pieces), UnknownWords(tokenizer)
        for number, part in enumerate(signals.until_signalled(parts, waits=True)):
            if options.resume and not number:
                progress.begin_at(prompt.num_bytes)
            unknown.add(part)
            reading.feed(part)
            last = [*last, *part[-LAST_TOKENS:].tolist()][-LAST_TOKENS:]
            progress.advance_to(prompt.num_bytes)
    unknown.warn_if_most("the prompt")
    reading.is_finished = not signals.received
    reading.save()  # a reader of stdout may close it while text is generated
    if not last and session.num_tokens[0]:
        last = stand_in(tokenizer)  # the text that the session has read is not saved
    ids: list[int] = []
    num_tokens = _num_new_tokens(session, tokenizer, options.max_new_tokens)
    new_tokens = session.stream(num_tokens, **sampling, allowed_token_ids=allowed_tokens(tokenizer))
    steps = signals.until_signalled(new_tokens)
    text = ""
    # Text that is printed on a terminal shows the progress itself.
    is_shown = options.json or not sys.stdout.isatty()
    with ProgressBar("generating", num_tokens, unit="token") as progress:
        for piece in decode_after(tokenizer, last, _append_each((step[0] for step in steps), ids)):
            text += piece
            if not options.json:
                print(piece, end="", flush=True)
            if is_shown:
                progress.advance_to(len(ids))
    return {
        "prompt_tokens": reading.position.length,
        "token_ids": ids,
        "text": text,
        "state_bytes": session.state_bytes,
    }


def _num_new_tokens(session: Session, tokenizer: Tokenizer, given: int | None) -> int:
    """Return the number of tokens to generate; of a series, so many that the last row is whole.

    Raises:
        InputError: The given number would cut a row.
    """
    num_tokens = NEW_TOKENS if given is None else given
    if not isinstance(tokenizer, BinTokenizer):
        return num_tokens
    num_columns, num_read = len(tokenizer.columns), session.num_tokens[0]
    missing = -(num_read + num_tokens) % num_columns
    if given is not None and missing:
        raise InputError(
            f"--max_new_tokens ({given}) must end with a row: a row has {num_columns} tokens, one for each column"
            + (f", and the session has read {num_read % num_columns} of one" if num_read % num_columns else "")
        )
    return num_tokens + missing


def _sampling_options(options: Any) -> dict[str, Any]:
    """Return the sampling options, checked before anything is loaded or read.

    Raises:
        InputError: An option is out of range.
    """
    check_sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.max_new_tokens is not None:
        check_integer("max_new_tokens", options.max_new_tokens, 0)
    if options.seed is not None:
        check_seed("seed", options.seed)
    return {key: options[key] for key in ("temperature", "top_k", "top_p", "seed")}


def _draw(model: LanguageModel, tokenizer: PixelTokenizer, options: Any, sampling: dict[str, Any]) -> None:
    from memformer.training.samples import sample_images, write_image_grid

    for flag in ("compiled", "resume"):
        if options[flag]:
            raise InputError(f"--{flag} does not apply to a run on images")
    text_only = ("prompt", "prompt_file", "load_session", "save_session", "save_every_minutes", "max_new_tokens")
    refuse_options(options, text_only, kind="on images")
    num_images = positive(options, "num_images", default=NUM_IMAGES)
    output = user_path(options.output or "images.png")
    check_can_write(output)
    with ProgressBar("sampling", tokenizer.height * tokenizer.width, unit="pixel") as progress:
        images = sample_images(model, tokenizer, num_images, **sampling, progress=progress.advance_to)
    write_image_grid(output, images, tokenizer=tokenizer)
    print(json.dumps({"output": str(output), "images": images.tolist()}) if options.json else f"wrote {output}")


def _append_each(ids: Any, into: list[int]) -> Any:
    """Yield the ids and append each of them to a list."""
    for token in ids:
        into.append(token)
        yield token
