"""`python -m memformer` is the command `memformer`."""

from memformer.cli import entry_point

entry_point()
