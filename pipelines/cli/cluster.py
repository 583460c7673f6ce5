"""Commands of Ray Jobs: submit, jobs, stop."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated

import typer

from advtrain.errors import UserError
from pipelines.cli.app import app, command

JobsAddress = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard.")
]
JOBS_ADDRESS = "http://127.0.0.1:8265"
#: Commands that can run as jobs.
SUBMITTABLE = ("train", "tune", "evaluate", "promote", "compare", "predict")


def check_command(words: Sequence[str]) -> list[str]:
    """Return the words if the command line understands them.

    Raises:
        UserError: no such command, option or value; the message is the command line's own.
    """
    if not words or words[0] not in SUBMITTABLE:
        raise UserError(f"submit takes {', '.join(SUBMITTABLE)} and their arguments, not '{' '.join(words)}'")
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    try:
        command.make_context(words[0], list(words[1:]))
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # typer's own exceptions, whose class it does not name in public
            raise
        raise UserError(f"advtrain {shlex.join(words)}: {error.format_message()}") from error
    return list(words)


@app.command(
    options_metavar="[OPTIONS] COMMAND [ARGUMENTS] ...",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def submit(
    context: typer.Context,
    address: JobsAddress = JOBS_ADDRESS,
    again: Annotated[
        str,
        typer.Option("--again", metavar="NAME", help="Submit what has succeeded once more, under this name."),
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Print what the job prints until it ends.")
    ] = False,
) -> None:
    """Submit a command (train, tune, evaluate, ...) with the working tree; the same one twice is one job."""
    from pipelines import submit as job

    raise typer.Exit(job.submit(check_command(context.args), address, again=again, follow=follow))


@command
def jobs(
    job: Annotated[str | None, typer.Argument(help="Follow this one.", show_default=False)] = None,
    address: JobsAddress = JOBS_ADDRESS,
) -> int:
    """List the cluster's jobs, or follow one."""
    from pipelines import submit as work

    return work.jobs(job, address)


@command
def stop(
    job: Annotated[str, typer.Argument(help="As submit named it.")], address: JobsAddress = JOBS_ADDRESS
) -> int:
    """Let a job save a checkpoint and end."""
    from pipelines import submit as work

    return work.stop(job, address)
