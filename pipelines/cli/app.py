"""Typer application, and the decorator for commands that return their exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from advtrain.environment import tune_malloc

if TYPE_CHECKING:
    from advtrain.events import Progress

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adversarial training: recipe -> run -> report -> registered model.",
)

Job = TypeVar("Job", bound=Callable[..., int])


def command(job: Job) -> Job:
    """Register a function as a command; its return value is the exit code."""

    @app.command()
    @functools.wraps(job)
    def run(*args: object, **kwargs: object) -> None:
        code = None
        tune_malloc()
        try:
            code = job(*args, **kwargs)
        finally:  # uploads pending files to the object store
            problems = storage.detach_all() if (storage := sys.modules.get("advtrain.runs.storage")) else []
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1 if problems and code == 0 else code)

    return job


@contextmanager
def reporting(json: Path | None = None) -> Iterator[Progress]:
    """Yield a callback that prints events, on standard error if JSON goes to standard output."""
    from advtrain.errors import UserError
    from pipelines.cli.console import ConsoleProgress, console

    if json is not None and str(json) != "-":  # fail before hours of work
        folder = json.resolve().parent
        if json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write '{json}': name a file in a folder that exists and is writable")
    console.stderr = json is not None and str(json) == "-"
    with ConsoleProgress() as progress:
        yield progress
