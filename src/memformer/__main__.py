"""Run the `memformer` command with `python -m memformer`."""

from memformer.cli.main import entry_point

entry_point()
