"""Names with an article, and numbers with a noun."""

import pytest

from memformer.utils.words import counted, with_article


@pytest.mark.parametrize(
    "name", ["an int", "a uint8", "an LSTM", "an lstm", "an AssociativeRecurrentMemoryTransformer", "a Memformer"]
)
def test_article_is_as_spoken(name):
    assert with_article(name.split()[1]) == name


@pytest.mark.parametrize(("number", "expected"), [(0, "0 slots"), (1, "1 slot"), (1000, "1,000 slots")])
def test_noun_is_in_the_plural_unless_there_is_one(number, expected):
    assert counted(number, "slot") == expected
