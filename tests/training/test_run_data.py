"""Data of a run: the documents of an evaluation."""

import numpy as np
import pytest

from memformer.data import corpus_from_arrays
from memformer.training.run_data import first_documents


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (100, 3), (None, 3)])
def test_first_documents_are_whole_and_reach_the_number_of_tokens(num_tokens, expected):
    corpus = corpus_from_arrays([np.zeros(length, dtype=np.int64) for length in (5, 3, 4)], 2)
    assert first_documents(corpus, num_tokens).num_documents == expected
