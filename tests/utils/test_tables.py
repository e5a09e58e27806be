"""Plain-text tables: aligned columns, independent of the terminal."""

from memformer.utils.tables import format_table


def test_columns_are_aligned_and_nothing_is_marked_up(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = format_table(("name", "bits/byte"), [("with [memory] :smile:", "1.2345"), ("erased", "12.3")])
    assert table.splitlines() == [
        "name                    bits/byte",
        "with [memory] :smile:      1.2345",
        "erased                       12.3",
    ]
