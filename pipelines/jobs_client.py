"""Ray's Jobs API: address of the dashboard, client, and output of a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from advtrain.environment import bypass_proxy_for_loopback, use_ray_token
from advtrain.errors import UserError
from advtrain.tracking.store import reason_of

#: Seconds that a dashboard has to answer.
ANSWER_S = 15.0
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
#: Environment variables with the cluster's address, in Ray's order.
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
#: Beginning of the line that Ray writes into a job's log before it runs the command.
MARKER = "Running entrypoint for job "


def jobs_address(given: str | None = None) -> str:
    """Return the URL of a cluster's dashboard.

    Args:
        given: URL, or HOST:PORT of the head, or auto; None: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS, else the
            dashboard on this machine.

    Raises:
        UserError: the address is of another kind, or no Ray head answers at HOST:PORT.
    """
    places = [("--address", given), *((f"${name}", os.environ.get(name)) for name in VARIABLES)]
    named = [(name, address.strip().rstrip("/")) for name, address in places if address and address.strip()]
    name, address = named[0] if named else ("", DEFAULT_ADDRESS)
    if (name, address) == ("$RAY_ADDRESS", "local"):  # Ray: a cluster of each process's own
        return DEFAULT_ADDRESS
    if address.startswith(("http://", "https://")):
        return address
    if "://" in address or address == "local":
        raise UserError(
            f"{name} '{address}' has no Jobs API; set --address to the cluster's dashboard, as http://HEAD:8265"
        )
    return _dashboard_of(name, address)


def _dashboard_of(name: str, address: str) -> str:
    """Return the URL of the dashboard of the Ray head at HOST:PORT."""
    bypass_proxy_for_loopback()
    use_ray_token()  # requests to an open cluster may carry one
    from ray.dashboard.utils import ray_address_to_api_server_url

    from advtrain.cluster import check_answer  # imports torch, which takes seconds

    try:
        check_answer(address)
        return str(ray_address_to_api_server_url(address))
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{name} '{address}': {reason_of(error)}; a dashboard's address begins with http://, as http://HEAD:8265"
        ) from error


def connect(address: str) -> Any:
    """Return a client for the cluster's jobs.

    Args:
        address: URL of the dashboard, see `jobs_address`.

    Raises:
        UserError: the cluster does not answer.
    """
    bypass_proxy_for_loopback()
    use_ray_token()
    import requests
    from ray.job_submission import JobSubmissionClient

    with reaching(address):
        requests.get(f"{address}/api/version", timeout=ANSWER_S)  # Ray's client has no timeout
    for name in (
        "ray",
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
    ):  # else each ignore file and upload is logged
        logging.getLogger(name).setLevel(logging.ERROR)
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}  # Ray prefers them
    try:
        with reaching(address):
            return JobSubmissionClient(address)
    finally:
        os.environ |= hidden


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Convert errors of requests to a cluster into a UserError."""
    from ray.exceptions import RayError

    try:
        yield
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        raise UserError(
            f"the cluster at {address} failed: {reason_of(error)}; set --address to its dashboard, as "
            "http://HEAD:8265"
        ) from error


class JobOutput:
    """Output of a job's command since its latest start; call it with each part of the log.

    Ray appends to the log of earlier starts, and begins with lines of its own.

    Args:
        seen: length of the log of earlier starts.
    """

    def __init__(self, seen: int = 0) -> None:
        self.seen = seen
        self.rest = ""  # Ray's own lines, as long as the command has not started
        self.has_begun = False

    def __call__(self, text: str) -> str:
        """Return what the command has written in this part of the log."""
        skipped = min(self.seen, len(text))
        self.seen, text = self.seen - skipped, text[skipped:]
        if self.has_begun:
            return text
        self.rest += text
        _, marker, line = self.rest.partition(MARKER)
        if not marker or "\n" not in line:
            return ""
        self.has_begun, self.rest = True, ""
        return line.partition("\n")[2]
