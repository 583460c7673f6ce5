"""A lock in an object store: `NAME/lease` says which process has a run, and is renewed while it does."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.lookup import UserError

#: Seconds after which a lease that nobody renews is free, and between renewals.
LEASE_S, RENEW_S = 60.0, 15.0


@contextmanager
def leased(store: Any, path: str, busy: str) -> Iterator[None]:
    """Hold the lease at `path` of a pyarrow filesystem for this process.

    One that is not renewed is waited for, up to LEASE_S: its holder may be dead. The store has no conditional write:
    of two that take a lease in the same second both may be told that they have it. What must not begin twice has a
    job's submission id for that.

    Raises:
        UserError: another process holds it; `busy` says so.
        OSError: the store is away.
    """
    mine = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"

    def write() -> None:
        with store.open_output_stream(path) as out:
            out.write(json.dumps({"holder": mine, "time": time.time()}).encode())

    _await(store, path, mine, busy)
    write()
    time.sleep(0.5)
    _await(store, path, mine, busy)
    done = threading.Event()

    def keep() -> None:
        while not done.wait(RENEW_S):
            with suppress(OSError):
                write()

    threading.Thread(target=keep, name="lease", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):
            store.delete_file(path)


def _await(store: Any, path: str, mine: str, busy: str) -> None:
    """Wait until nobody else holds the lease."""
    first = None
    while True:
        try:
            with store.open_input_stream(path) as source:
                lease = json.loads(source.read())
        except FileNotFoundError:
            return
        who, renewed = lease["holder"], lease["time"]
        host, pid, _ = who.split(" ")
        dead = host == socket.gethostname() and not Path(f"/proc/{pid}").exists()
        if who == mine or dead or time.time() - renewed >= LEASE_S:
            return
        if first not in (None, (who, renewed)):  # renewed, so its holder lives
            raise UserError(f"{busy} (process {pid} on {host})")
        first = (who, renewed)
        time.sleep(1)
