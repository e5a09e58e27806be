"""Random documents for the tests of evaluation."""

import numpy as np

from tests.helpers import VOCAB_SIZE


def documents(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB_SIZE, size=length) for length in lengths]
