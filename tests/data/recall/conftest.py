"""A fixture with a file of bAbI stories."""

import pytest

from tests.data.recall.texts import write_stories


@pytest.fixture
def path(tmp_path):
    return write_stories(tmp_path)
