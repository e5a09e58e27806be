"""`python -m memformer` is the command `memformer`."""

from memformer.cli.main import entry_point

entry_point()
