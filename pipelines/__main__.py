"""Entry point of `python -m pipelines`, the same as `advtrain`. Cluster jobs run it."""

import os
import sys

if sys.path[0] in (
    "",
    os.getcwd(),
):  # `python -m` puts the working folder first: its modules must replace no other
    del sys.path[0]

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
