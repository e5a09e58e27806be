"""Damaged files are refused or read as written, ten thousand times; `tests/soak/fuzz.py` does a million."""

import pytest

from tests.soak.fuzz import fuzz


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_give_the_documented_error_or_what_was_written(tmp_path, seed):
    counts, failures = fuzz(tmp_path, num_cases=5_000, seed=seed)
    assert failures == []
    assert all(counts[f"{target}: refused"] > 500 for target in ("session", "weights", "config", "checkpoint"))
