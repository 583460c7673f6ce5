"""Commands of Ray Jobs: submit, jobs, stop."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advtrain.errors import UserError
from pipelines.cli.app import app, command, reporting
from pipelines.cli.options import JsonOption, expand_path

if TYPE_CHECKING:
    from pipelines.submit import JobInfo

JobsAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="URL of the cluster's dashboard "
        "[default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or http://127.0.0.1:8265]",
    ),
]


def check_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command that a job can run, after parsing its options.

    Raises:
        UserError: unknown option or invalid value; the message is Typer's.
    """
    from pipelines.job_command import SUBMITTABLE

    if words and words[0] in SUBMITTABLE:  # `submit` itself rejects the others
        parse_command(words)
    return list(words)


def parse_command(words: Sequence[str]) -> list[str]:
    """Parse the command line `advtrain WORDS`; return the words that are left over.

    Raises:
        UserError: unknown option or invalid value; the message is Typer's.
    """
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    try:
        rest: list[str] = command.make_context(words[0], list(words[1:])).args
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # only Typer's own exceptions, whose class is not public, have it
            raise
        raise UserError(f"advtrain {shlex.join(words)}: {error.format_message()}") from error
    return rest


@app.command(
    options_metavar="[OPTIONS] COMMAND [ARGUMENTS] ...",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def submit(
    context: typer.Context,
    address: JobsAddress = None,
    again: Annotated[
        str,
        typer.Option("--again", metavar="NAME", help="Submit a succeeded job once more, under this name."),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's output until it ends.")] = False,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            "--working-dir",
            metavar="DIR",
            help="Folder to send, without what its .gitignore excludes "
            "[default: the working folder, in a git checkout]",
            callback=expand_path,
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option(
            "--runtime-env",
            metavar="FILE",
            help="YAML file of Ray's runtime environment, for example to install advtrain on the cluster.",
            callback=expand_path,
        ),
    ] = None,
) -> None:
    """Submit a command (train, tune, evaluate, ...) as a Ray job with the working tree.

    Submitting the same command twice creates one job. The command waits until the job has begun.
    """
    from pipelines import submit as job

    words = check_command(context.args)
    with reporting() as progress:
        info = job.submit(
            words,
            address,
            again=again,
            follow=follow,
            working_dir=working_dir,
            runtime_env_file=runtime_env,
            progress=progress,
        )
    raise typer.Exit(_exit_code(info, followed=follow))


@command
def jobs(
    job: Annotated[str | None, typer.Argument(help="Job to follow.", show_default=False)] = None,
    json: JsonOption = None,
    address: JobsAddress = None,
) -> int:
    """List the cluster's jobs, or follow one."""
    from pipelines import submit as work
    from pipelines.cli.console import table, write_json
    from pipelines.jobs_client import jobs_address

    if job is not None:
        with reporting() as progress:
            return _exit_code(work.follow_job(job, address, progress=progress), followed=True)
    with reporting(json):
        url = jobs_address(address)
        found = [asdict(info) for info in work.jobs(url)]
    write_json(json, found)
    names = ["job", "status", "started", "ended", "command"]
    table(f"jobs at {url}", names, [[info[name] for name in names] for info in found], fold=True)
    return 0


@command
def stop(
    job: Annotated[str, typer.Argument(help="Id that submit printed.")],
    json: JsonOption = None,
    address: JobsAddress = None,
) -> int:
    """Stop a job; it saves a checkpoint first."""
    from pipelines import submit as work
    from pipelines.cli.console import write_json
    from pipelines.cli.reports import STOPPED

    with reporting(json) as progress:
        info = work.stop(job, address, progress=progress)
    write_json(json, asdict(info))
    return STOPPED if info.status == "detached" else 0


def _exit_code(info: JobInfo, *, followed: bool) -> int:
    """Return the exit code of a job; return 0 for a submitted job that is not followed."""
    from pipelines.cli.reports import FAILED, STOPPED

    if not followed and info.status in ("pending", "running"):
        return 0
    return {"succeeded": 0, "stopped": STOPPED, "detached": STOPPED}.get(info.status, FAILED)
