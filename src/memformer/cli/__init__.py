"""The command `memformer`: one module for each subcommand."""
