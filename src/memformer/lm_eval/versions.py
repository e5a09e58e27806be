"""Check that the evaluation harness is installed."""

import importlib.util

from memformer.errors import InputError


def check_lm_eval() -> None:
    """Check that the package lm_eval is installed.

    Raises:
        InputError: It is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("memformer.lm_eval needs the package lm_eval: pip install 'memformer-lm[eval]'")
