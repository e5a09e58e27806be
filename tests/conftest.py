from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.helpers import VARIANTS, tiny_model

# Tests are small and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)


# Tests of whole runs and commands, which call the functions that the other tests check: checking every shape and type
# again at every call would take half of their time.
UNCHECKED = (
    *("cli", "hf", "lm_eval", "reproduction"),
    *("test_gpu_benchmark.py", "test_readme.py", "test_saved_before.py"),
)
# Of these folders, only these files are checked: the others repeat the same calls with many options.
CHECKED = {"generation": {"test_session"}, "training": {"test_engine"}}


def is_checked(path: Path) -> bool:
    """Return whether shapes and types are checked in the tests of a file."""
    first = path.relative_to(Path(__file__).parent).parts[0]
    return first not in UNCHECKED and path.stem in CHECKED.get(first, {path.stem})


@pytest.fixture(autouse=True, scope="module")
def _shape_checks(request):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or not is_checked(request.path))
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


@pytest.fixture
def make_model():
    return tiny_model
