"""Surprisal of the lines of a text: sums over the tokens of each line, and the lines with the most bits per byte."""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.data.lines import TextPart

# Bytes of a line that are kept for display. A line may be arbitrarily long.
TEXT_BYTES = 2000


@dataclass(frozen=True, kw_only=True)
class ScoredLine:
    """A line of a text, with the tokens that begin in it.

    Attributes:
        number: Number of the line, from 1.
        nll: Summed negative log-likelihood of the tokens, in nats.
        num_tokens: Number of the tokens.
        size: Size of the line in bytes, with its line end; for a row of a series, its number of values.
        text: The line without its line end, cut to `TEXT_BYTES`.
    """

    number: int
    nll: float = 0.0
    num_tokens: int = 0
    size: int = 0
    text: bytes = b""

    @property
    def bits_per_unit(self) -> float:
        """Bits per byte of the line, or per value of the row; 0 for a row without values."""
        return self.nll / math.log(2) / self.size if self.size else 0.0

    def to_state(self) -> list[Any]:
        """Return the fields as JSON values."""
        return [self.number, self.nll, self.num_tokens, self.size, _as_text(self.text)]

    @classmethod
    def from_state(cls, state: list[Any]) -> "ScoredLine":
        """Return the line that `to_state` described."""
        number, nll, num_tokens, size, text = state
        return cls(
            number=int(number), nll=float(nll), num_tokens=int(num_tokens), size=int(size),
            text=_as_bytes(text),
        )  # fmt: skip


class LineSums:
    """Sums negative log-likelihoods by line; the sums do not depend on the parts in which a text arrives.

    Args:
        line: The line that has begun. None: the first line of a text.
        unit: Unit of the size of a line: "byte", or "value" for a series, whose tokens are values.

    Attributes:
        line: The line that has begun, with what has arrived of it.
    """

    def __init__(self, line: ScoredLine | None = None, *, unit: str = "byte") -> None:
        self.line = ScoredLine(number=1) if line is None else line
        self._counts_tokens = unit == "value"

    def add(self, part: TextPart, nll: NDArray[np.float64]) -> list[ScoredLine]:
        """Add the next part of the text; return the lines that it ends.

        Args:
            part: The next part of the text.
            nll: Negative log-likelihood of each of its tokens, in nats.
        """
        pieces = part.content.split(b"\n")
        sums = np.bincount(part.lines, weights=nll, minlength=len(pieces)).tolist()
        counts = np.bincount(part.lines, minlength=len(pieces)).tolist()
        ended = []
        for index, piece in enumerate(pieces):
            is_ended = index + 1 < len(pieces)
            line = ScoredLine(
                number=self.line.number,
                nll=self.line.nll + sums[index],
                num_tokens=self.line.num_tokens + counts[index],
                size=self.line.size + (counts[index] if self._counts_tokens else len(piece) + is_ended),
                text=self.line.text + piece[: TEXT_BYTES - len(self.line.text)],
            )
            if is_ended:
                ended.append(line)
            self.line = ScoredLine(number=line.number + 1) if is_ended else line
        return ended

    def end(self) -> list[ScoredLine]:
        """Return the line that has begun, which the end of the text ends; nothing if the text ended with a line end."""
        line = self.line
        if not line.size:
            return []
        self.line = ScoredLine(number=line.number + 1)
        return [line]


@dataclass
class SurprisingLine:
    """A line with its context.

    Attributes:
        line: The line.
        before: Texts of the lines before it.
        after: Texts of the lines after it, as far as they have arrived.
    """

    line: ScoredLine
    before: list[bytes]
    after: list[bytes] = field(default_factory=list)


class SurprisingLines:
    """The lines with the most bits per byte, of any number of lines, with their context. Of equal lines the first stay.

    Args:
        count: Number of lines to keep.
        context: Number of lines before and after each.
    """

    def __init__(self, count: int, *, context: int) -> None:
        self._count = count
        self._context = context
        # The first entry is the next to be replaced. Numbers of lines differ, so lines are never compared themselves.
        self._heap: list[tuple[float, int, SurprisingLine]] = []
        self._before: deque[bytes] = deque(maxlen=context)
        self._waiting: deque[SurprisingLine] = deque(maxlen=context)

    def add(self, line: ScoredLine) -> None:
        """Add the next line."""
        for other in self._waiting:
            if line.number - other.line.number <= self._context:
                other.after.append(line.text)
        found = SurprisingLine(line, list(self._before))
        self._before.append(line.text)
        self._waiting.append(found)
        entry = (line.bits_per_unit, -line.number, found)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def most_surprising(self) -> list[SurprisingLine]:
        """Return the lines, the most surprising first."""
        return [found for _, _, found in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]

    def to_state(self) -> list[Any]:
        """Return all lines and what is known of the context of further ones, as JSON values."""
        kept = [
            [found.line.to_state(), [*map(_as_text, found.before)], [*map(_as_text, found.after)]]
            for found in self.most_surprising()
        ]
        return [kept, [*map(_as_text, self._before)], [found.line.number for found in self._waiting]]

    @classmethod
    def from_state(cls, state: list[Any], count: int, *, context: int) -> "SurprisingLines":
        """Return the lines that `to_state` described, which were collected with the same `count` and `context`."""
        lines = cls(count, context=context)
        kept, before, waiting = state
        for line, earlier, later in kept:
            scored = ScoredLine.from_state(line)
            found = SurprisingLine(scored, [*map(_as_bytes, earlier)], [*map(_as_bytes, later)])
            heapq.heappush(lines._heap, (scored.bits_per_unit, -scored.number, found))
        lines._before.extend(map(_as_bytes, before))
        by_number = {found.line.number: found for _, _, found in lines._heap}
        lines._waiting.extend(by_number[number] for number in waiting if number in by_number)
        return lines


def _as_text(content: bytes) -> str:
    """Return bytes as JSON can hold them, also where a character is cut."""
    return content.decode("latin-1")


def _as_bytes(text: str) -> bytes:
    return text.encode("latin-1")
