"""Damaged files are refused or read as they say, twelve thousand times; `tests/soak/fuzz.py` does a million."""

import pytest

from tests.soak.fuzz import fuzz, make_targets


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_give_the_documented_error_or_what_was_written(tmp_path, seed):
    counts, failures = fuzz(tmp_path, num_cases=6_000, seed=seed)
    assert failures == []
    (tmp_path / "again").mkdir()
    for target in make_targets(tmp_path / "again"):
        assert counts[f"{target.name}: refused"] > 250 * target.weight, target.name
