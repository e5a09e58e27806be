"""The `memformer` command line, one module per subcommand."""
