"""One file for each job: a function that returns values and reports events. `cli/` parses arguments and prints."""
