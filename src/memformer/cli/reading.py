"""Reading of a long prompt into a session, which is saved at intervals, so that a kill costs minutes."""

from collections.abc import Iterator
from pathlib import Path

from memformer.cli.positions import Position, TokenIds, take_up_to
from memformer.cli.saving import Saving
from memformer.errors import CheckpointError
from memformer.generation.session import Session
from memformer.utils.files import read_metadata

_NUM_TOKENS_KEY = "prompt_tokens"
_CHECKSUM_KEY = "prompt_crc32"


class Reading:
    """A session that reads a prompt and is saved while it reads.

    Args:
        session: The session, which has read the prompt up to `start`.
        file: Session file to write. None: nothing is saved.
        minutes: Minutes between two saves.
        start: Position in the prompt at which the session goes on.

    Attributes:
        position: The position up to which the session has read.
        is_finished: Whether the whole prompt was read.
    """

    def __init__(self, session: Session, file: Path | None, *, minutes: float, start: Position) -> None:
        self.session = session
        self.position = start
        self.is_finished = False
        self._saving = Saving(session, file, minutes=minutes)

    def feed(self, part: TokenIds) -> None:
        """Read the next tokens of the prompt, and save the session if the last save was `minutes` ago.

        Raises:
            InputError: A token id is outside the vocabulary, or the session's state is not finite.
            SaveError: The file cannot be written.
        """
        self.session.feed(part)
        self.position = self.position.after(part)
        self._saving.is_saved = False
        self.save_if_due()

    def save_if_due(self) -> None:
        """Save the session if the last save was `minutes` ago and it has read something since.

        Raises:
            InputError: The session's state is not finite.
            SaveError: The file cannot be written.
        """
        if self._saving.is_due():
            self.save()

    def save(self) -> None:
        """Save the session, if there is a file; until the prompt is finished, with the position in the prompt.

        Raises:
            InputError: The session's state is not finite.
            SaveError: The file cannot be written.
        """
        position = {_NUM_TOKENS_KEY: str(self.position.length), _CHECKSUM_KEY: str(self.position.checksum)}
        self._saving.save({} if self.is_finished else position)


def saved_position(file: Path) -> Position | None:
    """Return the position in its prompt at which a session was saved; None if it was not reading a prompt.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    metadata = read_metadata(file)
    if _NUM_TOKENS_KEY not in metadata:
        return None
    try:
        return Position(int(metadata[_NUM_TOKENS_KEY]), int(metadata[_CHECKSUM_KEY]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its position in the prompt is not a number") from error


def skip_to(position: Position, parts: Iterator[TokenIds]) -> Iterator[TokenIds]:
    """Yield the tokens of a prompt from a position on.

    Raises:
        InputError: The prompt is shorter, or begins with other tokens than those read before.
    """
    yield from take_up_to(position, parts, text="prompt", unit="tokens", done="read")
    yield from parts
