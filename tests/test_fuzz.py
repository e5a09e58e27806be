"""1,500 cases of the fuzz test in tests/soak/fuzz.py, which runs a million in `make soak`."""

from tests.soak.fuzz import fuzz, make_targets


def test_damaged_files_are_refused_or_read_correctly(tmp_path):
    counts, failures = fuzz(tmp_path, num_cases=1_500, seed=0)
    assert failures == []
    (tmp_path / "again").mkdir()
    for target in make_targets(tmp_path / "again"):
        assert counts[f"{target.name}: refused"] > 60 * target.weight, target.name
