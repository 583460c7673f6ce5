"""Command line: parse arguments and print results, one module per command group."""
