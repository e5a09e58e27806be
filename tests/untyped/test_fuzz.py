"""12,000 cases of the fuzz test in tests/soak/fuzz.py, which runs a million in `make soak`."""

import pytest

from tests.soak.fuzz import fuzz, make_targets


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_refused_or_read_correctly(tmp_path, seed):
    counts, failures = fuzz(tmp_path, num_cases=6_000, seed=seed)
    assert failures == []
    (tmp_path / "again").mkdir()
    for target in make_targets(tmp_path / "again"):
        assert counts[f"{target.name}: refused"] > 250 * target.weight, target.name
