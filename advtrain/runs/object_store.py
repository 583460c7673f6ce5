"""Object stores by URI, and leases in them: `NAME/lease` names the process that holds a run."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.errors import UserError

logger = logging.getLogger(__name__)

#: Seconds until a lease that is not renewed expires, and between renewals.
LEASE_S, RENEW_S = 60.0, 15.0
#: Environment variables that select the store of an s3:// URI; no secrets.
WHICH_STORE = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def is_uri(place: str) -> bool:
    """Return whether a place is in an object store, not on a disk."""
    return "://" in place


def connect(uri: str) -> tuple[Any, str]:
    """Return the pyarrow filesystem of a URI and the path in it.

    $AWS_ENDPOINT_URL_S3, else $AWS_ENDPOINT_URL, else $MLFLOW_S3_ENDPOINT_URL sets an S3 endpoint. Credentials
    come from where the AWS SDK finds them (environment, profile, instance) and are never stored.

    Raises:
        UserError: the URI is not supported.
    """
    from pyarrow import fs

    try:
        if uri.startswith("file://"):
            raise ValueError("a local folder is given by its path")
        if "@" in uri:  # messages, tags and records contain the URI, so it must not
            uri = uri.partition("://")[0] + "://..."
            raise ValueError("it must not contain credentials")
        if not uri.startswith("s3://"):
            return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = endpoint or os.environ.get("MLFLOW_S3_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        scheme, _, host = (endpoint or "").rpartition("://")
        store = fs.S3FileSystem(
            endpoint_override=host or None,
            scheme=scheme or "https",
            region=region,
            connect_timeout=5,
            request_timeout=30,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"cannot use '{uri}': {error}; write s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        ) from error
    return store, uri.removeprefix("s3://").rstrip("/")


@contextmanager
def leased(
    store: Any, path: str, busy: str, wait_s: float = 0.0, lost: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lease at `path` of a pyarrow filesystem for this process.

    A lease that is not renewed for LEASE_S seconds is taken over: its holder is dead or disconnected. If the
    old holder then reconnects, `lost` is called. The store has no conditional write, so two processes that take a
    lease in the same second may both hold it. Jobs that must not start twice use their submission id instead.

    Args:
        wait_s: seconds to wait for a live holder.
        lost: called in a thread when another process has taken the lease.

    Raises:
        UserError: another process holds it; `busy` is the message.
        OSError: the store is unreachable.
    """
    mine = f"{socket.gethostname()} {os.getpid()} {process_space()} {time.time_ns()}"

    def write() -> None:
        with store.open_output_stream(path) as out:
            out.write(json.dumps({"holder": mine, "time": time.time()}).encode())

    _await(store, path, mine, busy, wait_s)
    write()
    time.sleep(0.5)
    _await(store, path, mine, busy, wait_s)
    done = threading.Event()

    def ours() -> bool:
        """Return whether no other process holds the lease.

        A lease that cannot be read is ours: our last renewal was interrupted.
        """
        try:
            now = _holder(store, path)
        except _DamagedError:
            return True
        return now is None or now[0] == mine

    def keep() -> None:
        while not done.wait(RENEW_S):
            with suppress(OSError):
                if not ours():
                    lost()
                    return
                write()

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):
            if ours():
                store.delete_file(path)


class _DamagedError(OSError):
    """Lease whose holder cannot be read."""


def _holder(store: Any, path: str) -> tuple[str, float] | None:
    """Return the holder of the lease and its renewal time; None if there is no lease.

    pyarrow requests an object's size and then as many bytes, so an object overwritten in between can be truncated.
    """
    for _ in range(20):
        try:
            with store.open_input_stream(path) as source:
                lease = json.loads(source.read())
            return str(lease["holder"]), float(lease["time"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            time.sleep(0.05)
    raise _DamagedError(f"the lease at '{path}' is damaged; delete it if no process uses the run")


def process_space() -> str:
    """Return the PID namespace, which distinguishes containers on one host; "-" if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "-"


def _await(store: Any, path: str, mine: str, busy: str, wait_s: float) -> None:
    """Wait until no other process holds the lease."""
    begun = seen_at = time.monotonic()
    seen = None
    while (lease := _holder(store, path)) is not None and lease[0] != mine:
        host, pid, space, _ = lease[0].split(" ")
        here = (host, space) == (socket.gethostname(), process_space())
        if here and not Path(f"/proc/{pid}").exists():
            return
        now = time.monotonic()
        if lease != seen:
            if seen is not None and now - begun >= wait_s:  # renewed, so its holder is alive
                raise UserError(f"{busy} (process {pid} on {host})")
            seen, seen_at = lease, now
        elif now - seen_at >= LEASE_S:
            return
        time.sleep(min(1.0, RENEW_S / 2))
