"""Fixtures: a tiny run without interruption."""

import shutil

import pytest

from memformer.cli.main import main
from tests.helpers import skip_report
from tests.training.runs import config_file, run_config, write_documents


@pytest.fixture(scope="module")
def without_report():
    """Runs in one file, and the one that its tests share, write no HTML summary."""
    with pytest.MonkeyPatch.context() as patch:
        skip_report(patch)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, without_report):
    """Documents and an uninterrupted run on them; read-only."""
    base = tmp_path_factory.mktemp("loop")
    write_documents(base / "texts")
    assert main(["train", config_file(run_config(base, "unbroken"))]) == 0
    return base


@pytest.fixture(scope="module")
def unbroken(base):
    return base / "unbroken"


@pytest.fixture
def copied(unbroken, tmp_path):
    """A copy of the uninterrupted run, which a test may change."""
    return shutil.copytree(unbroken, tmp_path / "copied")
