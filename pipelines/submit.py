"""Commands as Ray jobs: submit them idempotently, follow, list and stop them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from advtrain.errors import UserError, nearest
from advtrain.events import Message, Output, Progress, ignore
from advtrain.runs.object_store import WHICH_STORE, is_uri
from advtrain.tracking.store import has_password
from advtrain.user_paths import user_path

#: Commands that run with `--once`, so that a resubmitted job resumes its run or campaign.
ONCE = ("train", "tune")
#: Commands that can run as jobs.
SUBMITTABLE = (*ONCE, "evaluate", "promote", "compare", "predict")
#: Largest working tree that is uploaded, in 10^6 bytes; Ray's own limit is 500.
MAX_MB = 100.0
#: Seconds that a stopped job has to save a checkpoint before Ray kills it (Ray's own default is 3).
STOP_WAIT_S = 300
#: Environment variables passed to the job. None of them is a secret, since Ray shows them to everyone.
PASSED_ON = ("MLFLOW_TRACKING_URI", "ADVTRAIN_DATA_ROOT", *WHICH_STORE)
DONE = ("SUCCEEDED", "FAILED", "STOPPED")


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
    address: str,
    *,
    again: str = "",
    follow: bool = False,
    progress: Progress = ignore,
) -> JobInfo:
    """Submit `advtrain WORDS` with the working tree; with `follow` wait until the job ends.

    The job id contains a hash of `words` and `again`. A running or succeeded job is not submitted again. A failed or
    stopped job is submitted again, and resumes.

    Raises:
        UserError: a folder or store that other machines cannot reach, a tree that is too large, no cluster.
    """
    words = list(words)
    if not words or words[0] not in SUBMITTABLE:
        raise UserError(f"submit takes {', '.join(SUBMITTABLE)} and their arguments, not '{' '.join(words)}'")
    check_shared_folders(words)
    job, command = submission_id(words, again), shlex.join(words)
    client = connect(address)
    with _reaching(address):
        status = _status(client, job)
        if status in ("PENDING", "RUNNING"):
            progress(Message(f"job {job} is {status.lower()} already"))
        elif status == "SUCCEEDED":
            text = f"job {job} has succeeded already; --again NAME submits it once more"
            progress(Message(text))
            return JobInfo(job, "succeeded", command=command)
        else:
            if status is not None:
                how = "had failed" if status == "FAILED" else "was stopped"
                progress(Message(f"job {job} {how}: submitting it again"))
                client.delete_job(job)
            tree = {"working_dir": str(working_tree()), "env_vars": passed_on()}
            _patiently(
                lambda: client.submit_job(
                    entrypoint=entrypoint(words, job),
                    submission_id=job,
                    runtime_env=tree,
                    metadata={"advtrain": command},
                )
            )
            progress(Message(f"job {job}: advtrain {command}"))
    if not follow:
        running = status.lower() if status in ("PENDING", "RUNNING") else "pending"
        text = f"advtrain jobs {job} --address {address} follows it; advtrain stop {job} ends it"
        progress(Message(text))
        return JobInfo(job, running, command=command)
    return follow_job(job, address, progress=progress)


def follow_job(job: str, address: str, *, progress: Progress = ignore) -> JobInfo:
    """Report a job's output until it ends.

    Ctrl-C stops following, with the status "detached"; the job keeps running.
    """
    client = connect(address)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            progress(Output(lines))

    with _reaching(address):
        _require(client, job)
        try:
            asyncio.run(tail())
        except KeyboardInterrupt:
            text = f"\njob {job} keeps running; advtrain jobs {job} follows it, advtrain stop {job} ends it"
            progress(Message(text))
            return JobInfo(job, "detached")
        status = str(_status(client, job)).lower()
    progress(Message(f"job {job}: {status}", "success" if status == "succeeded" else "note"))
    return JobInfo(job, status)


def jobs(address: str) -> list[JobInfo]:
    """Return all jobs of this project, oldest first."""
    client = connect(address)
    with _reaching(address):
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


def stop(job: str, address: str, *, progress: Progress = ignore) -> JobInfo:
    """Stop a job and wait until it has ended; it saves a checkpoint first."""
    client = connect(address)
    with _reaching(address):
        status = _require(client, job)
        if status in DONE:
            progress(Message(f"job {job} has ended already"))
            return JobInfo(job, status.lower())
        client.stop_job(job)
    progress(Message(f"job {job} is saving a checkpoint and stopping; submit it again to resume"))
    return follow_job(job, address, progress=progress)


def check_shared_folders(words: Sequence[str]) -> None:
    """Raise a UserError if a job's results would be deleted, or its command shows a password."""
    if words[0] in (*ONCE, "evaluate", "compare") and not _shared(_option(words, "--runs") or "."):
        raise UserError(
            "Ray deletes a job's working folder: name a shared folder or an object store with --runs, as "
            "--runs /mnt/runs or --runs s3://BUCKET/runs"
        )
    for word in words:
        option, equals, value = word.partition("=")
        _refuse_password("an option", word)
        if equals and option.startswith("--"):
            _refuse_password(option, value)
    uri = _option(words, "--tracking-uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or re.match(r"sqlite:///[^/]", uri):
        raise UserError(
            "Ray deletes a job's working folder: name an MLflow server with --tracking-uri or $MLFLOW_TRACKING_URI"
        )


def _refuse_password(where: str, value: str) -> None:
    if "://" in value and has_password(value):
        raise UserError(
            f"{where} holds a password, which a job would show to everyone; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD on the cluster's nodes instead"
        )


def _shared(runs: str) -> bool:
    """Return True if other machines can reach these run folders."""
    return is_uri(runs) or Path(runs).is_absolute()


def _option(words: Sequence[str], name: str) -> str | None:
    """Return the value of an option, written as `--runs DIR` or `--runs=DIR`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def submission_id(words: Sequence[str], again: str = "") -> str:
    """Return the job id of a command: readable, and equal for equal `words` and `again`."""
    first = re.sub(r"[^A-Za-z0-9]+", "-", Path(words[1]).stem if len(words) > 1 else "").strip("-")
    digest = hashlib.sha256(json.dumps([list(words), again]).encode()).hexdigest()[:10]
    return "-".join(part for part in ("advtrain", words[0], first[:40], digest) if part)


def entrypoint(words: Sequence[str], job: str) -> str:
    """Return the command line that the cluster runs."""
    once = ["--once", job] if words[0] in ONCE and "--resume" not in words else []
    return shlex.join(["python", "-m", "pipelines", *words, *once])


def working_tree() -> Path:
    """Return the working folder; Ray uploads its files that git does not ignore.

    Raises:
        UserError: the folder is not in a git checkout, or its files are too large. The message lists the largest.
    """
    here = Path.cwd()
    listed = subprocess.run(
        # The folder's own configuration could name a program for git to run.
        [
            "git",
            "-c",
            "core.fsmonitor=false",
            "-c",
            "core.hooksPath=/dev/null",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        capture_output=True,
        text=True,
        cwd=here,
    )
    if listed.returncode:
        raise UserError(f"'{here}' is no git checkout; jobs get the files that git does not ignore")
    private = [name for name in listed.stdout.splitlines() if _is_private(here / name)]
    if private:
        raise UserError(
            f"'{private[0]}' may hold a secret, and every file that git does not ignore is sent: add it to .gitignore"
        )
    sizes = {
        name: (here / name).stat().st_size / 1e6
        for name in listed.stdout.splitlines()
        if (here / name).is_file()
    }
    total = sum(sizes.values())
    if total > MAX_MB:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        shown = ", ".join(f"{name} ({sizes[name]:.0f} MB)" for name in largest)
        raise UserError(
            f"the working tree is {total:.0f} MB, above the limit of {MAX_MB:.0f} MB; the largest: {shown}. "
            "Exclude them in .gitignore or .rayignore"
        )
    return here


def _is_private(path: Path) -> bool:
    """Return whether a file is named as keys and secrets are, or is the signing key."""
    named = os.environ.get("ADVTRAIN_SIGNING_KEY")
    is_key = named is not None and path.resolve() == user_path(named, "$ADVTRAIN_SIGNING_KEY").resolve()
    return is_key or path.suffix in (".pem", ".key") or path.name.startswith(".env")


def passed_on() -> dict[str, str]:
    """Return the job's environment variables; raise a UserError if one holds a password.

    Ray shows them to everyone, so secrets are set on the cluster's nodes.
    """
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for name, value in found.items():
        _refuse_password(f"${name}", value)
    return found | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"}


def connect(address: str) -> Any:
    """Return a client for the cluster's jobs.

    Raises:
        UserError: the cluster does not answer.
    """
    tokens = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(name in os.environ for name in tokens) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads a token only in this mode
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # else it logs every file that it excludes
    with _reaching(address):
        return JobSubmissionClient(address)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"the cluster at {address} failed: {first}; set --address to its dashboard, as http://HEAD:8265"
        ) from error


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


def _require(client: Any, job: str) -> str:
    status = _status(client, job)
    if status is None:
        known = [d.submission_id for d in client.list_jobs() if d.submission_id]
        raise UserError(f"no job '{job}'{nearest(job, known) if known else '; the cluster has no jobs'}")
    return status


def _clock(milliseconds: int | None) -> str:
    return "-" if not milliseconds else datetime.fromtimestamp(milliseconds / 1000).strftime("%m-%d %H:%M:%S")
