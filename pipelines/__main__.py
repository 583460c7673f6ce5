"""`python -m pipelines COMMAND` is `advtrain COMMAND`; it is what cluster jobs run."""

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
