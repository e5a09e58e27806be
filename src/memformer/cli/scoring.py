"""Scoring of a text that may never end: what `memformer score` has summed up, saved with the session and continued."""

import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.cli.positions import Position
from memformer.cli.saving import Saving
from memformer.data.lines import TextPart
from memformer.errors import CheckpointError, InputError
from memformer.evaluation.surprisal import LineSums, ScoredLine, SurprisingLines
from memformer.generation.session import Session
from memformer.utils.files import read_metadata

STATE_KEY = "scoring"
_CHECKSUM_KEY = "scoring_crc32"
_BLOCK_BYTES = 1 << 20


@dataclass
class Totals:
    """Sums over a text.

    Attributes:
        nll: Negative log-likelihood, in nats.
        num_tokens: Number of tokens.
        size: Number of bytes, or of values of a series.
        num_lines: Number of lines that have ended.
        most_bits: The most bits per byte (or value) of any of these lines.
    """

    nll: float = 0.0
    num_tokens: int = 0
    size: int = 0
    num_lines: int = 0
    most_bits: float = 0.0


class Scoring:
    """A session that scores a text, and what it has found so far.

    Args:
        session: The session.
        saving: Saves the session.
        top: Number of most surprising lines to keep.
        context: Number of lines of context to keep with each of them.
        unit: Unit of the size of a line: "byte", or "value" for a series.

    Attributes:
        session: As above.
        sums: The sums of the line that has begun.
        totals: The sums of this text.
        surprising: The most surprising lines of this text.
        position: The position in this text up to which it was scored.
        held: Beginning of the next line, which was read from an earlier text and not scored yet.
        held_before: The same when this text began.
        is_finished: Whether the text was scored to its end.
    """

    def __init__(self, session: Session, saving: Saving, *, top: int, context: int, unit: str) -> None:
        self.session = session
        self.sums = LineSums(unit=unit)
        self.totals = Totals()
        self.surprising = SurprisingLines(top, context=context)
        self.position = Position()
        self.held = self.held_before = b""
        self.is_finished = False
        self._saving = saving
        self._options = [top, context]
        self._unit = unit

    def score(self, part: TextPart) -> tuple[NDArray[np.float64], list[ScoredLine]]:
        """Score the next part; return the negative log-likelihood of each token in nats, and the lines that end.

        Raises:
            InputError: A token id is outside the vocabulary, or a value is not finite.
        """
        nll = self.session.score(part.token_ids)
        assert not isinstance(nll, list)
        values = nll.double().numpy()
        self.totals.nll += float(values.sum())
        self.totals.num_tokens += len(values)
        self.totals.size += len(values) if self._unit == "value" else len(part.content)
        lines = self.sums.add(part, values)
        self._add(lines)
        # The first part begins with what an earlier text has left.
        self.position = self.position.after(part.content[len(self.held) :])
        self.held = b""
        self._saving.is_saved = False
        return values, lines

    def end_line(self) -> list[ScoredLine]:
        """End the line that has begun; return it, or nothing if none has."""
        lines = self.sums.end()
        self._add(lines)
        return lines

    def _add(self, lines: list[ScoredLine]) -> None:
        for line in lines:
            self.totals.num_lines += 1
            self.totals.most_bits = max(self.totals.most_bits, line.bits_per_unit)
            self.surprising.add(line)

    def save_if_due(self) -> None:
        """Save the session if the last save was long enough ago and anything was scored since.

        Raises:
            InputError: The session's state is not finite.
            SaveError: The file cannot be written.
        """
        if self._saving.is_due():
            self.save()

    def save(self) -> None:
        """Save the session with the line that has begun; until the text is finished, with all that was found as well.

        Raises:
            InputError: The session's state is not finite.
            SaveError: The file cannot be written.
        """
        state: dict[str, Any] = {"line": self.sums.line.to_state(), "held": self.held.decode("latin-1")}
        if not self.is_finished:
            state["text"] = {
                "position": list(self.position),
                "held_before": self.held_before.decode("latin-1"),
                "totals": vars(self.totals),
                "options": self._options,
                "surprising": self.surprising.to_state(),
            }
        text = json.dumps(state)
        self._saving.save({STATE_KEY: text, _CHECKSUM_KEY: str(zlib.crc32(text.encode()))})

    def restore(self, file: Path, *, resumes: bool) -> None:
        """Continue the scoring that was saved with the session.

        Args:
            file: The session file.
            resumes: Whether the text is the one that was being scored, rather than the next one.

        Raises:
            CheckpointError: The file is missing or damaged.
            InputError: `resumes` is set, and the session was not scoring a text, or with other options.
        """
        state = _read_state(file)
        text: dict[str, Any] | None = state.get("text")
        if text is None and resumes:
            raise InputError(
                f"{file} is not in the middle of a text, so there is no scoring to resume; "
                "continue the session with --load_session instead of --resume"
            )
        if text is not None and resumes and text.get("options") != self._options:
            raise InputError(
                f"the scoring in {file} began with --top and --context {text.get('options')}, now they are "
                f"{self._options}; it can only be resumed with the same"
            )
        with _parsing(file):
            if "line" in state:
                self.sums = LineSums(ScoredLine.from_state(state["line"]), unit=self._unit)
                self.held = self.held_before = state["held"].encode("latin-1")
            if text is not None and resumes:
                count, context = self._options
                self.totals = Totals(**text["totals"])
                self.surprising = SurprisingLines.from_state(text["surprising"], count, context=context)
                self.position = Position(*text["position"])
                self.held_before = text.get("held_before", "").encode("latin-1")


@contextmanager
def _parsing(file: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its scoring cannot be read") from error


def scored_position(file: Path) -> Position | None:
    """Return the position in its text at which a session was saved; None if it was not in the middle of scoring one.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    text = _read_state(file).get("text")
    with _parsing(file):
        return None if text is None else Position(*text["position"])


def held_bytes(file: Path) -> int:
    """Return the number of bytes at the end of the text scored by a session that the session has not read.

    They begin a line of subwords or words, which is read when its end arrives.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return len(str(_read_state(file).get("held", "")))


def _read_state(file: Path) -> dict[str, Any]:
    metadata = read_metadata(file)
    text = metadata.get(STATE_KEY)
    if text is None:
        return {}
    state = None
    if metadata.get(_CHECKSUM_KEY) == str(zlib.crc32(text.encode())):
        state = json.loads(text)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} is damaged: its scoring does not match its checksum")
    return state


def blocks_up_to(num_bytes: int, stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the first bytes of a stream in blocks."""
    while num_bytes and (block := stream.read(min(_BLOCK_BYTES, num_bytes))):
        num_bytes -= len(block)
        yield block
