"""Typer application: groups of commands, options of every command, exit codes."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from advtrain.environment import library_versions, tune_malloc

if TYPE_CHECKING:
    from advtrain.events import Progress

#: Commands of each group in --help, the most used ones first.
GROUPS = {
    "Train": ("init", "train", "data", "recipes", "show", "sync"),
    "Search and compare": ("tune", "compare"),
    "Evaluate and predict": ("evaluate", "predict", "shadow"),
    "Model registry": ("models", "promote", "rollback", "history", "copy", "dashboard", "relocate"),
    "Cluster and machine": ("submit", "jobs", "stop", "doctor"),
}


class GroupedCommands(TyperGroup):
    """Program whose help lists the commands by group."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the groups, then those of no group."""
        listed = [name for names in GROUPS.values() for name in names if name in self.commands]
        return listed + [name for name in self.commands if name not in listed]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each group with the first sentence of every command."""
        names = self.list_commands(ctx)
        rest = [name for name in names if not any(name in group for group in GROUPS.values())]
        width = max(map(len, names))
        for title, group in {**GROUPS, "Other commands": tuple(rest)}.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(limit=200))
                for name in names
                if name in group
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adversarial training: recipe -> run -> report -> registered model.",
)


@dataclass
class Verbosity:
    """Amount of output besides the result of a command."""

    quiet: bool = False  # only warnings and errors
    verbose: bool = False  # also logs and warnings of libraries, and the traceback of an error


verbosity = Verbosity()


def _print_version(wanted: bool) -> None:
    if wanted:
        versions = library_versions()
        typer.echo(f"advtrain {versions.pop('advtrain')}")
        typer.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the versions of advtrain and libraries.",
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the result, warnings and errors, and no progress.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print logs and warnings of the libraries.")
]


@app.callback()
def main_options(
    version: VersionOption = False, quiet: QuietOption = False, verbose: VerboseOption = False
) -> None:
    """Set the options that stand before the command."""
    verbosity.quiet = verbosity.verbose = False
    set_verbosity(quiet=quiet, verbose=verbose)


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Set --quiet or --verbose, given before or after the command.

    Raises:
        UserError: both are given.
    """
    from advtrain.errors import UserError

    verbosity.quiet |= quiet
    verbosity.verbose |= verbose
    if verbosity.quiet and verbosity.verbose:
        raise UserError("--quiet and --verbose exclude each other; give one of them")
    if verbosity.verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger().setLevel(logging.INFO)
        warnings.simplefilter("default")
    elif not sys.warnoptions:  # set by `python -W` or $PYTHONWARNINGS
        warnings.simplefilter("ignore")


Job = TypeVar("Job", bound=Callable[..., int])


def command(job: Job) -> Job:
    """Register a function as a command; its return value is the exit code.

    The command also takes --quiet and --verbose.
    """

    @functools.wraps(job)
    def run(*args: object, quiet: bool = False, verbose: bool = False, **kwargs: object) -> None:
        code = None
        set_verbosity(quiet=quiet, verbose=verbose)
        tune_malloc()
        try:
            code = job(*args, **kwargs)
        finally:  # uploads pending files to the object store
            problems = storage.detach_all() if (storage := sys.modules.get("advtrain.runs.storage")) else []
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1 if problems and code == 0 else code)

    signature = inspect.signature(job, eval_str=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", QuietOption), ("verbose", VerboseOption))
    ]
    described: Any = run
    described.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *shared])
    app.command()(run)
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
    with ConsoleProgress(quiet=verbosity.quiet) as progress:
        yield progress
