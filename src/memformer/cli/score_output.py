"""Output of `memformer score`: lines, tokens, totals and the most surprising lines, as text or as JSON lines."""

import json
import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memformer.cli.scoring import Scoring, Totals
from memformer.data import Tokenizer
from memformer.data.lines import TextPart
from memformer.data.outside_tokenizers import LAST_TOKENS, decode_after, stand_in
from memformer.evaluation.likelihood import content_unit
from memformer.evaluation.surprisal import ScoredLine, SurprisingLine
from memformer.utils.tables import format_table

_MARK = "!"


class ScoreOutput:
    """Prints results to stdout as they become known.

    Args:
        options: Options of the command: `per`, `top`, `threshold` and `json`.
        tokenizer: The tokenizer of the text.
        goes_on: Whether the text goes on with another one, so that its first token may begin with a space.
    """

    def __init__(self, options: Any, tokenizer: Tokenizer, *, goes_on: bool) -> None:
        self._per = options.per
        if self._per is None and options.top is None and options.threshold is None:
            self._per = "line"
        self._threshold = options.threshold
        self._is_json = options.json
        self._tokenizer = tokenizer
        self._unit = content_unit(tokenizer)
        self._has_header = self._is_json
        self._before = stand_in(tokenizer) if goes_on else []

    @property
    def leaves_terminal_free(self) -> bool:
        """Whether nothing is printed to a terminal before the end, so that progress can be shown there."""
        is_quiet = self._per in {None, "document"} and self._threshold is None
        return is_quiet or not sys.stdout.isatty()

    def tokens(self, part: TextPart, nll: NDArray[np.float64], *, first_line: int) -> None:
        """Print the tokens of a part, if tokens are to be printed.

        Args:
            part: The part.
            nll: Negative log-likelihood of each of its tokens, in nats.
            first_line: Number of the line in which the part begins.
        """
        if self._per != "token":
            return
        self._print_header(f"{'line':>9}  {'nats':>9}  token")
        for token, line, nats in zip(part.token_ids.tolist(), part.lines.tolist(), nll.tolist(), strict=True):
            text = self._text_of(token)
            number = first_line + line
            if self._is_json:
                self._print_json("token", line=number, token_id=token, nats=nats, text=text)
            else:
                print(f"{number:>9}  {nats:>9.4f}  {text!r}")
        sys.stdout.flush()

    def _text_of(self, token: int) -> str:
        """Return the text of the next token; one of a SentencePiece tokenizer depends on that before it."""
        text = "".join(decode_after(self._tokenizer, self._before, [token]))
        self._before = [*self._before, token][-LAST_TOKENS:]
        return text

    def lines(self, lines: list[ScoredLine]) -> None:
        """Print lines that have ended, if they are to be printed."""
        for line in lines:
            is_above = self._threshold is not None and line.bits_per_unit > self._threshold
            if self._per != "line" and not is_above:
                continue
            self._print_header(f"  {'line':>9}  {f'bits/{self._unit}':>10}  {'nats':>9}  text")
            if self._is_json:
                marked = {} if self._threshold is None else {"is_above_threshold": is_above}
                self._print_json("line", **self._line_fields(line), **marked)
            else:
                mark = _MARK if is_above and self._per == "line" else " "
                text = _printable(line.text)
                print(f"{mark} {line.number:>9}  {line.bits_per_unit:>10.3f}  {line.nll:>9.2f}  {text}")
        if lines:
            sys.stdout.flush()

    def end(self, scoring: Scoring) -> None:
        """Print what is known at the end: the totals and the most surprising lines, if they are to be printed."""
        if self._per == "document":
            self._print_totals(scoring.totals)
        for rank, found in enumerate(scoring.surprising.most_surprising(), start=1):
            if self._is_json:
                context = {"before": [*map(_shown_line, found.before)], "after": [*map(_shown_line, found.after)]}
                self._print_json("top", rank=rank, **self._line_fields(found.line), **context)
            else:
                self._print_top(rank, found)
        sys.stdout.flush()

    def _print_totals(self, totals: Totals) -> None:
        bits = totals.nll / math.log(2)
        per_unit, per_token = (bits / count if count else 0.0 for count in (totals.size, totals.num_tokens))
        if self._is_json:
            bits_of = {f"bits_per_{self._unit}": per_unit, "bits_per_token": per_token}
            counts_of = {"tokens": totals.num_tokens, f"{self._unit}s": totals.size, "lines": totals.num_lines}
            self._print_json("document", nats=totals.nll, **bits_of, **counts_of)
            return
        counts = (totals.num_tokens, totals.size, totals.num_lines)
        row = (f"{per_unit:.4f}", f"{per_token:.4f}", f"{totals.nll:,.2f}", *(f"{count:,}" for count in counts))
        columns = (f"bits/{self._unit}", "bits/token", "nats", "tokens", f"{self._unit}s", "lines")
        print(format_table(columns, [row]))

    def _print_top(self, rank: int, found: SurprisingLine) -> None:
        line = found.line
        print(f"{rank}. line {line.number:,}: {line.bits_per_unit:.3f} bits/{self._unit}, {line.nll:.2f} nats")
        first = line.number - len(found.before)
        for number, text in enumerate([*found.before, line.text, *found.after], start=first):
            print(f"{'>' if number == line.number else ' '} {number:>9}  {_printable(text)}")
        print()

    def _print_header(self, header: str) -> None:
        if not self._has_header:
            print(header)
            self._has_header = True

    def _line_fields(self, line: ScoredLine) -> dict[str, Any]:
        return {
            "line": line.number,
            "nats": line.nll,
            f"bits_per_{self._unit}": line.bits_per_unit,
            "tokens": line.num_tokens,
            f"{self._unit}s": line.size,
            "text": _shown_line(line.text),
        }

    def _print_json(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"kind": kind, **fields}))


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _shown_line(line: bytes) -> str:
    """Return a line's text without the carriage return that ends it in files of Windows."""
    return _shown(line.removesuffix(b"\r"))


def _printable(text: bytes) -> str:
    """Return a line's text as a terminal can show it: control characters could change what is on the screen."""
    shown = _shown_line(text)
    return shown if shown.isprintable() else "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in shown)
