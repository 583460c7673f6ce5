"""Commands as Ray jobs: submit them idempotently, follow, list and stop them."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from advtrain.errors import UserError, nearest
from advtrain.events import Message, Output, Progress, ignore
from pipelines.job_command import (
    SUBMITTABLE,
    entrypoint,
    find_problems,
    missing_data,
    missing_weights,
    raise_all,
    runtime_env,
    submission_id,
    with_runs,
)
from pipelines.jobs_client import MARKER, JobOutput, connect, jobs_address, reaching
from pipelines.upload import working_tree

DONE = ("SUCCEEDED", "FAILED", "STOPPED")
#: Longest wait of `submit` for the first output of a job, in seconds.
START_S = 120.0
#: Seconds after its first output for which a job must still run.
GRACE_S = 5.0
#: Seconds between two looks at a job.
POLL_S = 0.5


@dataclass(frozen=True)
class JobInfo:
    """Job on the cluster."""

    job: str
    status: str  # pending, running, succeeded, failed, stopped; or detached: following it was interrupted
    started: str = ""
    ended: str = ""
    command: str = ""


def submit(
    words: Sequence[str],
    address: str | None = None,
    *,
    again: str = "",
    follow: bool = False,
    working_dir: Path | None = None,
    runtime_env_file: Path | None = None,
    progress: Progress = ignore,
) -> JobInfo:
    """Submit `advtrain WORDS` with the working tree, and wait until the job has begun.

    The job id contains a hash of `words` and `again`. A running or succeeded job is not submitted again. A failed or
    stopped job is submitted again, and resumes.

    Args:
        words: command and its arguments. $ADVTRAIN_RUNS stands for a missing `--runs`.
        address: see `jobs_address`.
        again: name under which a succeeded job is submitted once more.
        follow: report the job's output until it ends.
        working_dir: folder that is sent; None: the working folder, in a git checkout.
        runtime_env_file: YAML file with further settings of Ray's runtime environment.
        progress: called with each message, and with the output of a job that failed to start.

    Raises:
        UserError: a folder or store that other machines cannot reach, a tree that is too large, no cluster. It names
            all of them.
    """
    if not words or words[0] not in SUBMITTABLE:
        raise UserError(f"submit takes {', '.join(SUBMITTABLE)} and their arguments, not '{' '.join(words)}'")
    words = with_runs(words)
    url, client, env = _prepare(words, address, working_dir, runtime_env_file)
    for remark in filter(None, (missing_data(words, env), missing_weights(words, env))):
        progress(Message(remark, "warning"))
    if words[0] == "doctor":  # a job each time, whose results are wanted
        again, follow = again or str(time.time_ns()), True
    job, command = submission_id(words, again), shlex.join(words)
    with reaching(url):
        status = _status(client, job)
        if status == "SUCCEEDED":
            text = f"job {job} has succeeded already; --again NAME submits it once more"
            progress(Message(text))
            return JobInfo(job, "succeeded", command=command)
        seen = None
        if status in ("PENDING", "RUNNING"):
            progress(Message(f"job {job} is {str(status).lower()} already"))
        else:
            seen = _start(client, job, words, env, status, progress)
    if follow:
        return follow_job(job, url, progress=progress, seen=seen)
    if seen is not None:
        try:
            with reaching(url):
                status = _await_start(client, job, seen, progress)
        except KeyboardInterrupt:
            return _detached(job, url, progress)
    if status in ("PENDING", "RUNNING"):
        text = f"advtrain jobs {job} --address {url} follows it; advtrain stop {job} --address {url} ends it"
        progress(Message(text))
    return JobInfo(job, str(status).lower(), command=command)


def _prepare(
    words: Sequence[str], address: str | None, working_dir: Path | None, runtime_env_file: Path | None
) -> tuple[str, Any, dict[str, Any]]:
    """Return the dashboard's URL, a client for it, and the runtime environment of a job.

    Raises:
        UserError: it names all that is missing.
    """
    problems, url, client, env = find_problems(words), "", None, {}
    try:
        tree = working_tree(working_dir)
        env = runtime_env(tree, runtime_env_file)
    except UserError as error:
        problems.append(str(error))
    try:
        url = jobs_address(address)
        client = connect(url)
    except UserError as error:
        problems.append(str(error))
    raise_all(problems)
    return url, client, env


def _start(
    client: Any, job: str, words: Sequence[str], env: dict[str, Any], before: str | None, progress: Progress
) -> int:
    """Submit a job; return the length of its earlier log.

    `before` is the status of an earlier start, FAILED or STOPPED; None if there is none.
    """
    seen = 0
    if before is not None:
        how = "had failed" if before == "FAILED" else "was stopped"
        progress(Message(f"job {job} {how}: submitting it again"))
        seen = len(_log(client, job))
        client.delete_job(job)
    command = shlex.join(words)
    _patiently(
        lambda: client.submit_job(
            entrypoint=entrypoint(words, job),
            submission_id=job,
            runtime_env=env,
            metadata={"advtrain": command},
        )
    )
    progress(Message(f"job {job}: advtrain {command}"))
    return seen


def _await_start(client: Any, job: str, seen: int, progress: Progress) -> str:
    """Wait until a job's command has begun or the job has ended; return its status.

    The checks before a training also print. So a command has begun only if it still runs GRACE_S seconds after its
    first output.

    The output of a job that has ended is reported.

    Args:
        client: client of the cluster.
        job: id of the job.
        seen: length of the log before the job was submitted.
        progress: called with the reason why a job is pending, and with the output.
    """
    deadline, has_output, reason = time.monotonic() + START_S, False, ""
    while True:
        details, output = client.get_job_info(job), JobOutput(seen)
        status, text = str(details.status.value), output(_log(client, job))
        if status in DONE:
            if text := text + output.rest:
                progress(Output(text))
            _report_end(client, job, output, progress)
            return status
        reason = _show_pending(details, job, reason, progress)
        if text.strip() and not has_output:
            has_output, deadline = True, time.monotonic() + GRACE_S
        if has_output and time.monotonic() >= deadline:
            progress(Message(f"job {job} is running"))
            return status
        if time.monotonic() > deadline:
            progress(Message(f"job {job} is {status.lower()}, without output for {START_S:.0f} s", "note"))
            return status
        time.sleep(POLL_S)


def follow_job(
    job: str, address: str | None = None, *, progress: Progress = ignore, seen: int | None = None
) -> JobInfo:
    """Report the output of a job's latest start until the job ends.

    Ctrl-C stops following, with the status "detached"; the job keeps running.

    Args:
        job: id of the job.
        address: see `jobs_address`.
        progress: called with each message and each part of the output.
        seen: length of the log of earlier starts; None: up to the latest start in the log.
    """
    url = jobs_address(address)
    client = connect(url)

    async def tail(output: JobOutput) -> None:
        async for lines in client.tail_job_logs(job):
            if text := output(lines):
                progress(Output(text))

    with reaching(url):
        _require(client, job)
        output = JobOutput(max(0, _log(client, job).rfind(MARKER)) if seen is None else seen)
        try:
            reason = ""
            while str((details := client.get_job_info(job)).status.value) == "PENDING":
                reason = _show_pending(details, job, reason, progress)
                time.sleep(POLL_S)
            asyncio.run(tail(output))
        except KeyboardInterrupt:
            return _detached(job, url, progress)
        if output.rest:
            progress(Output(output.rest))
        status = _report_end(client, job, output, progress)
    return JobInfo(job, status)


def _show_pending(details: Any, job: str, reason: str, progress: Progress) -> str:
    """Report why a job is pending, if it is for another reason than `reason`; return the present one."""
    if details.status.value == "PENDING" and details.message and details.message != reason:
        progress(Message(f"job {job} is pending: {details.message}"))
        return str(details.message)
    return reason


def _detached(job: str, url: str, progress: Progress) -> JobInfo:
    """Report that a job is no longer followed."""
    text = (
        f"\njob {job} keeps running; advtrain jobs {job} --address {url} follows it, "
        f"advtrain stop {job} --address {url} ends it"
    )
    progress(Message(text))
    return JobInfo(job, "detached")


def _report_end(client: Any, job: str, output: JobOutput, progress: Progress) -> str:
    """Report how a job has ended; return its status in small letters."""
    details = client.get_job_info(job)
    status = str(details.status.value).lower()
    # else the last line of the output is the reason
    reason = f": {details.message}" if status == "failed" and not output.has_begun else ""
    progress(Message(f"job {job}: {status}{reason}", "success" if status == "succeeded" else "note"))
    return status


def jobs(address: str | None = None) -> list[JobInfo]:
    """Return all jobs of this project, oldest first; for the address see `jobs_address`."""
    url = jobs_address(address)
    client = connect(url)
    with reaching(url):
        found = sorted(client.list_jobs(), key=lambda details: details.start_time or 0)
    return [
        JobInfo(
            d.submission_id,
            d.status.value.lower(),
            _clock(d.start_time),
            _clock(d.end_time),
            d.metadata["advtrain"],
        )
        for d in found
        if d.submission_id and "advtrain" in (d.metadata or {})
    ]


def stop(job: str, address: str | None = None, *, progress: Progress = ignore) -> JobInfo:
    """Stop a job and wait until it has ended; it saves a checkpoint first.

    Args:
        job: id of the job.
        address: see `jobs_address`.
        progress: called with each message and each part of the output.
    """
    url = jobs_address(address)
    client = connect(url)
    with reaching(url):
        status = _require(client, job)
        if status in DONE:
            progress(Message(f"job {job} has ended already"))
            return JobInfo(job, status.lower())
        client.stop_job(job)
    progress(Message(f"job {job} is saving a checkpoint and stopping; submit it again to resume"))
    return follow_job(job, url, progress=progress)


def _patiently(action: Callable[[], Any]) -> None:
    """Retry for 60 s while a newly started cluster has no agent that accepts jobs."""
    deadline = time.monotonic() + 60
    while True:
        try:
            action()
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def _status(client: Any, job: str) -> str | None:
    """Return a job's status; return None if the id is unknown."""
    try:
        return str(client.get_job_status(job).value)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


def _log(client: Any, job: str) -> str:
    """Return a job's log; return an empty text as long as there is none."""
    try:
        return str(client.get_job_logs(job) or "")
    except RuntimeError:
        return ""


def _require(client: Any, job: str) -> str:
    status = _status(client, job)
    if status is None:
        known = [d.submission_id for d in client.list_jobs() if d.submission_id]
        raise UserError(f"no job '{job}'{nearest(job, known) if known else '; the cluster has no jobs'}")
    return status


def _clock(milliseconds: int | None) -> str:
    return "-" if not milliseconds else datetime.fromtimestamp(milliseconds / 1000).strftime("%m-%d %H:%M:%S")
