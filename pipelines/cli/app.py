"""The application, and what a command is: a function whose result is the exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import typer

from advtrain.environment import tune_malloc

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adversarial training: recipe -> run -> report -> registered model.",
)

Job = TypeVar("Job", bound=Callable[..., int])


def command(job: Job) -> Job:
    """Add a command whose result is the exit code."""

    @app.command()
    @functools.wraps(job)
    def run(*args: object, **kwargs: object) -> None:
        code = None
        tune_malloc()
        try:
            code = job(*args, **kwargs)
        finally:  # sends what an object store does not have yet
            problems = storage.detach_all() if (storage := sys.modules.get("advtrain.runs.storage")) else []
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1 if problems and code == 0 else code)

    return job
