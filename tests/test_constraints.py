"""The tested versions stand in constraints.txt for pip, and again in pyproject.toml for `uv sync`."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_uv_and_pip_get_the_same_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for_pip = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for_uv = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert for_pip
    assert for_uv["constraint-dependencies"] == for_pip
