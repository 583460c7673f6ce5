"""Entry point of `python -m pipelines`, the same as `advtrain`. Cluster jobs run it."""

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
