"""Hooks of back-propagation are checked before anything is computed."""

import pytest

from memformer import InputTypeError, backpropagate
from memformer.training.replay import RolloutHooks
from tests.helpers import random_rollout, tiny_model


def test_hooks_that_are_no_functions_are_refused_before_anything_is_computed():
    with pytest.raises(InputTypeError, match=r"hooks.auxiliary_weight is 0.5; it must be a function or None"):
        RolloutHooks(auxiliary_weight=0.5)
    with pytest.raises(InputTypeError, match="hooks"):
        backpropagate(tiny_model(), random_rollout(1, 1), hooks=None)
