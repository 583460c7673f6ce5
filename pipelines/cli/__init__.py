"""The command line: arguments in, text out. One file for each group of commands."""
