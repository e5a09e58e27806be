"""Warns of a session that was saved in the middle of a text, the rest of which it will not read."""

from pathlib import Path

from memformer.cli.reading import saved_position
from memformer.cli.scoring import scored_position
from memformer.utils.progress import print_warning


def warn_if_unfinished(file: Path) -> None:
    """Print a warning if the session in a file was reading a prompt or scoring a text when it was saved.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    for position, text, command, work in (
        (saved_position(file), "tokens of a prompt", "generate", "read"),
        (scored_position(file), "bytes of a text", "score", "score"),
    ):
        if position is not None:
            print_warning(
                f"{file} was saved after {position.length:,} {text}, before its end; memformer {command} with "
                f"--save_session and --resume would {work} the rest"
            )
