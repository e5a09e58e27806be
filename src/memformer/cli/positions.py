"""Positions in a text that a command reads: what was read before is recognized when the text is given again."""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from memformer.errors import InputError

TokenIds = NDArray[np.integer[Any]]
Part = TypeVar("Part", bytes, TokenIds)


class Position(NamedTuple):
    """A position in a text, or in its tokens.

    Attributes:
        length: Number of bytes or tokens before it.
        checksum: CRC-32 of these, by which another text is recognized.
    """

    length: int = 0
    checksum: int = 0

    def after(self, part: bytes | TokenIds) -> "Position":
        """Return the position after the next bytes or tokens."""
        content = part if isinstance(part, bytes) else part.astype("<i8").tobytes()
        return Position(self.length + len(part), zlib.crc32(content, self.checksum))


def take_up_to(
    position: Position, parts: Iterator[Part], *, text: str, unit: str, done: str, ends_part: bool = False
) -> list[Part]:
    """Take the parts of a text up to a position; return what is left of the last of them, if anything.

    Args:
        position: The position.
        parts: The text from its beginning.
        text: Name of the text in messages.
        unit: What it consists of, for messages.
        done: What was done with what precedes the position, for messages.
        ends_part: Whether a part must end at the position.

    Raises:
        InputError: The text is shorter, or begins with other bytes or tokens than those before, or no part ends at the
            position.
    """
    skipped = Position()
    rest: list[Part] = []
    while skipped.length < position.length:
        part = next(parts, None)
        if part is None:
            raise InputError(
                f"the {text} has {skipped.length:,} {unit}, but the saved session has {done} "
                f"{position.length:,} of its {text}; give the same {text}"
            )
        end = len(part) if ends_part else min(position.length - skipped.length, len(part))
        skipped = skipped.after(part[:end])
        rest = [part[end:]] if end < len(part) else []
    if skipped != position:
        raise InputError(
            f"the first {position.length:,} {unit} of the {text} are not those that the saved session has {done}; "
            f"give the same {text}"
        )
    return rest
