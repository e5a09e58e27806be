"""Sums by line do not depend on the parts of a text, and the lines that are kept are those of a full sort."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memformer.data.lines import TextPart
from memformer.evaluation.surprisal import TEXT_BYTES, LineSums, ScoredLine, SurprisingLines

contents = st.text("ab\n", max_size=40).map(str.encode)


def part_of(content, values):
    """Return a part whose tokens are its bytes, and their negative log-likelihoods."""
    is_end = np.frombuffer(content, np.uint8) == ord("\n")
    part = TextPart(content, np.frombuffer(content, np.uint8), is_end.cumsum() - is_end)
    return part, np.asarray(values, np.float64)


@given(content=contents, data=st.data())
def test_sums_by_line_do_not_depend_on_the_parts(content, data):
    values = [1.0 + index for index in range(len(content))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    sums, found = LineSums(), []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        found += sums.add(*part_of(content[start:end], values[start:end]))
        # The line that has begun is the same after it was saved and loaded.
        sums = LineSums(ScoredLine.from_state(json.loads(json.dumps(sums.line.to_state()))))
    found += sums.end()
    assert sums.end() == []
    position = 0
    for line, text in zip(found, content.splitlines(keepends=True), strict=True):
        expected = sum(values[position : position + len(text)])
        position += len(text)
        assert (line.nll, line.num_tokens, line.size) == (expected, len(text), len(text))
        assert line.text == text.removesuffix(b"\n")
        assert line.bits_per_unit == pytest.approx(expected / len(text) / math.log(2))
    assert [line.number for line in found] == [*range(1, len(found) + 1)]


def test_a_line_of_any_length_takes_constant_memory():
    sums = LineSums()
    for _ in range(3):
        sums.add(*part_of(b"x" * TEXT_BYTES, np.ones(TEXT_BYTES)))
    assert (sums.line.size, sums.line.nll, len(sums.line.text)) == (3 * TEXT_BYTES, 3.0 * TEXT_BYTES, TEXT_BYTES)


@given(
    scores=st.lists(st.integers(0, 5), max_size=30),
    count=st.integers(1, 6),
    context=st.integers(0, 3),
    saved_at=st.integers(0, 30),
)
def test_the_most_surprising_lines_are_those_of_a_full_sort(scores, count, context, saved_at):
    """With the lines around them, the first of equals, and also if they were saved and continued in between."""
    lines = [ScoredLine(number=n, nll=float(s), size=1, text=b"%d" % n) for n, s in enumerate(scores, start=1)]
    kept = SurprisingLines(count, context=context)
    for index, line in enumerate(lines):
        if index == saved_at:
            kept = SurprisingLines.from_state(json.loads(json.dumps(kept.to_state())), count, context=context)
        kept.add(line)
    best = sorted(lines, key=lambda line: (-line.nll, line.number))[:count]
    found = kept.most_surprising()
    assert [item.line for item in found] == best
    for item in found:
        index = item.line.number - 1
        assert item.before == [line.text for line in lines[max(index - context, 0) : index]]
        assert item.after == [line.text for line in lines[index + 1 : index + 1 + context]]
