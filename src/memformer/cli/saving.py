"""Saving of a session at intervals while a command reads, so that a kill costs minutes; the options for it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from memformer.data import BinTokenizer, Tokenizer
from memformer.errors import InputError
from memformer.generation.session import Session
from memformer.utils.checks import check_number
from memformer.utils.files import user_path

# Minutes rather than tokens: the loss by a kill is then the same at any speed of reading, and so is the share of time
# spent on saving.
SAVE_EVERY_MINUTES = 5.0


class Saving:
    """Saving of a session at intervals.

    Args:
        session: The session.
        file: Session file to write. None: nothing is saved.
        minutes: Minutes between two saves.

    Attributes:
        is_saved: Whether the session is as it was saved last; false after every reading.
    """

    def __init__(self, session: Session, file: Path | None, *, minutes: float) -> None:
        self._session = session
        self._file = file
        self._seconds = 60 * minutes
        self._last_save = time.monotonic()
        self.is_saved = True

    def is_due(self) -> bool:
        """Return whether the last save was `minutes` ago and the session has read something since."""
        return not self.is_saved and time.monotonic() - self._last_save >= self._seconds

    def save(self, metadata: Mapping[str, str]) -> None:
        """Save the session with additional metadata, if there is a file.

        Raises:
            InputError: The session's state is not finite.
            SaveError: The file cannot be written.
        """
        if self._file is not None:
            self._session.save(self._file, metadata=metadata)
            self._last_save = time.monotonic()
        self.is_saved = True


def add_saving_arguments(parser: ArgumentParser, *, text: str) -> None:
    """Add the options for session files; `text` names what the command reads."""
    parser.add_argument("--load_session", type=str, default=None, help="Session file to continue from.")
    parser.add_argument(
        "--save_session",
        type=str,
        default=None,
        help=f"File to save the session to: at the end, on an interrupt, and at intervals while the {text} is read.",
    )
    parser.add_argument(
        "--save_every_minutes",
        type=float | None,
        default=None,
        help=f"Minutes between two saves to --save_session while the {text} is read. Default: {SAVE_EVERY_MINUTES:g}.",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"Load the session in --save_session, which was saved while it read the same {text}, and read the rest.",
    )


def check_session_file(options: Any, file: Path) -> None:
    """Check that a session, whose file this process owns, replaces no file but the one that it begins with.

    Raises:
        InputError: The file exists, and the session does not begin with it.
    """
    begins_with = None if options.load_session is None else user_path(options.load_session)
    if begins_with is not None and not begins_with.exists():
        return  # nothing is written: loading says what is missing
    if options.resume or not file.exists() or (begins_with is not None and file.samefile(begins_with)):
        return
    raise InputError(
        f"--save_session {file} exists: give --load_session {file} too to go on from it, --resume to read the rest of "
        "its text, or another file"
    )


def check_whole_rows(session: Session, tokenizer: Tokenizer, source: Path) -> None:
    """Check that the next row of a series can be read by a loaded session: it has read whole rows.

    Raises:
        InputError: The session stops in the middle of a row, as generation does that was interrupted.
    """
    if isinstance(tokenizer, BinTokenizer) and (read := session.num_tokens[0] % len(tokenizer.columns)):
        raise InputError(
            f"{source} has read {read} of the {len(tokenizer.columns)} columns of a row; memformer generate without "
            "a prompt finishes the row"
        )


@contextmanager
def saved_on_refusal(work: Any, file: Path | None) -> Iterator[None]:
    """Save a `Scoring` or a `Reading` if the `with` block refuses the rest of its text, such as a byte in the middle.

    Raises:
        InputError: As in the block; the message also says where the session is.
    """
    start = work.position.length
    try:
        yield
    except InputError as error:
        if file is None or work.position.length == start:
            raise
        work.save()
        raise InputError(f"{error}; the session up to there is saved to {file}") from error


def check_saving_options(options: Any) -> float:
    """Return the minutes between two saves, after checking the options that --save_session needs or excludes.

    Raises:
        InputError: One of them is given without --save_session, is out of range, or contradicts another one.
    """
    if options.save_every_minutes is not None:
        check_number("save_every_minutes", options.save_every_minutes, above=0)
    for name, is_given in (("save_every_minutes", options.save_every_minutes is not None), ("resume", options.resume)):
        if is_given and options.save_session is None:
            raise InputError(f"--{name} is given without --save_session; give the session file with it")
    if options.resume and options.load_session is not None:
        raise InputError(
            "--resume and --load_session are both given; --resume loads the session in --save_session, so leave out "
            "--load_session"
        )
    return SAVE_EVERY_MINUTES if options.save_every_minutes is None else options.save_every_minutes
