"""Commands of a cluster's jobs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli import app, command

JobsAddress = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard.")
]
JOBS_ADDRESS = "http://127.0.0.1:8265"


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

    raise typer.Exit(job.submit(context.args, address, again=again, follow=follow))


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
