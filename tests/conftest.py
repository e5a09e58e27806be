import os
from pathlib import Path

import pytest

# Compile in the process of the tests: the workers that torch would start import torch first, which takes longer.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The compiler is taken to know the vector instructions of the processor: to find out takes some 15 s a process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch
from hypothesis import settings

from tests.helpers import VARIANTS, skip_report

# Tests are small and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)

# The same examples at every run, however long one takes. `--hypothesis-profile searching` draws others.
settings.register_profile("searching", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# Tests of the parts of the package: `make test` runs them with the annotated shapes and types checked at every call,
# which doubles their time. `make soak` runs more tests with the checks.
CHECKED_FOLDERS = {"evaluation", "models", "nn"}
CHECKED_FILES = {"test_engine.py", "test_rollout.py", "test_session.py"}


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=["checked", "rest"],
        help="Run only the tests whose calls are checked for shapes and types, or only the others.",
    )


def pytest_ignore_collect(collection_path, config):
    part = config.getoption("part")
    if part is None or collection_path.is_dir():
        return None
    folder = collection_path.relative_to(Path(__file__).parent).parts[0]
    is_checked = folder in CHECKED_FOLDERS or collection_path.name in CHECKED_FILES
    return True if is_checked != (part == "checked") else None


def pytest_collection_modifyitems(items):
    # The longest tests first, so that no process works on one of them while the others have nothing left to do.
    items.sort(key=lambda item: "compiled" not in item.path.parts)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No test survives a power cut, so none waits until the disk has what was written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def without_report(monkeypatch):
    """Runs in one test write no HTML summary."""
    skip_report(monkeypatch)
