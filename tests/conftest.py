import pytest
import torch

from tests.helpers import VARIANTS, tiny_model

# Tests are small and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


@pytest.fixture
def make_model():
    return tiny_model
