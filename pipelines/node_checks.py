"""Checks of `advtrain doctor` on every node of a cluster: versions, run folder, MLflow."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from advtrain.environment import LIBRARIES
from advtrain.errors import UserError
from advtrain.runs.object_store import WHICH_STORE, connect, is_uri
from advtrain.runs.storage import shared_place
from advtrain.training.failures import SOURCE, versions_here

#: Seconds that all nodes together have to answer.
NODES_S = 50.0
#: Ports of databases whose URI has none.
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class NodeFacts:
    """Findings of a node; an empty text is no problem."""

    versions: dict[str, str]
    folder: str = ""  # why its file in the run folder could not be written
    mlflow: str = ""  # why MLflow does not answer


def check_nodes(runs: Path, tracking_uri: str) -> Iterator[tuple[str, str, list[str]]]:
    """Check every node of the connected cluster; yield its name, versions and problems.

    Args:
        runs: folder of the runs, in which each node writes a file that this process must see.
        tracking_uri: MLflow store; a SQLite file is used by this process only, and not checked.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    existing = next(path for path in (runs, *runs.parents) if path.exists())
    place = shared_place(runs) if is_uri(shared_place(runs)) else str(existing)
    names = {node["NodeID"]: f".advtrain-doctor-{secrets.token_hex(8)}" for node in nodes}
    variables = {name: os.environ[name] for name in WHICH_STORE if name in os.environ}
    server = server_of(tracking_uri)
    found = _on_nodes(_look(), {i: (LIBRARIES, place, name, *server, variables) for i, name in names.items()})
    unseen = {i: (place, name) for i, name in names.items() if not _take(place, name)}
    _on_nodes(_remove(), {i: words for i, words in unseen.items() if isinstance(found[i], NodeFacts)})
    here = versions_here()
    for node in nodes:
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        facts = found[node["NodeID"]]
        if isinstance(facts, str):
            yield name, "", [facts]
            continue
        versions = ", ".join(f"{key} {value}" for key, value in facts.versions.items() if key != SOURCE)
        yield name, versions, _problems(facts, here, place, is_seen=node["NodeID"] not in unseen)


def _problems(facts: NodeFacts, here: dict[str, str], place: str, *, is_seen: bool) -> list[str]:
    """Return what is wrong with a node, each with its remedy."""
    found = []
    differences = [
        f"{name} is {facts.versions.get(name)} there and {version} here"
        for name, version in here.items()
        if facts.versions.get(name) != version
    ]
    if differences:
        found.append(f"{', '.join(differences)}; install the same versions on every node")
    if facts.folder:
        found.append(
            f"run folder '{place}': {facts.folder}; use --runs with a folder that every node can write"
        )
    elif not is_seen:
        found.append(
            f"run folder '{place}' is another folder there; mount the same one on every node, or use --runs "
            "s3://BUCKET/FOLDER"
        )
    if facts.mlflow:
        found.append(f"MLflow does not answer there: {facts.mlflow}; name a server that every node reaches")
    return found


def server_of(uri: str) -> tuple[str, str, int]:
    """Return the URL of an MLflow server, or the host and port of a database.

    ("", "", 0) for a SQLite file, and for a database whose host is not in the URI, or that has several.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return uri.rstrip("/"), "", 0
    try:
        host, port = parts.hostname or "", parts.port or PORTS.get(parts.scheme.partition("+")[0], 0)
    except ValueError:
        return "", "", 0
    return ("", host, port) if host and port else ("", "", 0)


def _on_nodes(function: Callable[..., Any], arguments: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Call a function on each node, with arguments by node id; return its results, or texts of what failed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    calls = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            *words
        )
        for node, words in arguments.items()
    }
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODES_S) if calls else ([], [])
    found: dict[str, Any] = {}
    for node, call in calls.items():
        if call not in ready:
            ray.cancel(call, force=True)
            found[node] = f"no answer within {NODES_S:.0f} s; look at Ray's logs on the node"
            continue
        try:
            values = ray.get(call)
            found[node] = NodeFacts(*values) if isinstance(values, tuple) else values
        except Exception as error:  # noqa: BLE001 (the node's own errors)
            found[node] = f"Ray cannot run a task there: {str(error).strip().splitlines()[-1][:300]}"
    return found


def _look() -> Callable[..., tuple[dict[str, str], str, str]]:
    """Return the function that runs on each node.

    It is a local function, which Ray sends as a whole: a node may lack this package.
    """
    reach = _reach()

    def look(
        libraries: tuple[str, ...],
        place: str,
        name: str,
        url: str,
        host: str,
        port: int,
        variables: dict[str, str],
    ) -> tuple[dict[str, str], str, str]:
        import os
        import platform
        from importlib import metadata

        os.environ |= variables
        versions, folder = {"python": platform.python_version()}, ""
        for library in libraries:
            try:
                versions[library] = metadata.version(library)
            except metadata.PackageNotFoundError:
                versions[library] = "not installed"
        try:
            from advtrain.environment import code_digest

            versions["advtrain's source"] = code_digest()
        except ImportError as error:
            versions["advtrain's source"] = f"not importable ({error})"
        try:
            if "://" in place:
                from advtrain.runs.object_store import connect

                store, root = connect(place)
                store.open_output_stream(f"{root}/{name}").close()
            else:
                with open(os.path.join(place, name), "x"):
                    pass
        except Exception as error:  # noqa: BLE001 (any is the answer)
            folder = getattr(error, "strerror", None) or str(error)[:200]
        return versions, folder, reach(url, host, port)

    return look


def _reach() -> Callable[[str, str, int], str]:
    """Return the function that tells why a server does not answer a node; "" if it does."""

    def reach(url: str, host: str, port: int) -> str:
        import os
        import socket
        import ssl
        import urllib.error
        import urllib.request
        from http.client import HTTPException

        try:
            if url:
                names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE")
                authority = next(filter(None, map(os.environ.get, names)), None)
                context = ssl.create_default_context(cafile=authority)
                if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS") == "true":
                    context = ssl._create_unverified_context()  # noqa: S323 (MLflow's own setting)
                urllib.request.urlopen(f"{url}/health", timeout=5, context=context).close()  # noqa: S310 (http)
            elif host:
                socket.create_connection((host, port), timeout=5).close()
        except urllib.error.HTTPError as error:  # without credentials, a server answers with 401
            return f"HTTP error {error.code}" if error.code >= 500 else ""
        except (OSError, HTTPException, ValueError) as error:
            return str(getattr(error, "reason", None) or error)[:200]
        return ""

    return reach


def _remove() -> Callable[[str, str], None]:
    """Return the function that removes a node's file in a folder that is not shared."""

    def remove(place: str, name: str) -> None:
        import os
        from contextlib import suppress

        with suppress(OSError):
            os.remove(os.path.join(place, name))

    return remove


def _take(place: str, name: str) -> bool:
    """Remove a node's file; return whether it was there."""
    if not is_uri(place):
        try:
            (Path(place) / name).unlink()
        except OSError:
            return False
        return True
    with suppress(OSError, UserError):
        store, root = connect(place)
        if store.get_file_info(f"{root}/{name}").type.name == "File":
            store.delete_file(f"{root}/{name}")
            return True
    return False
