"""Registered models: versions with their metrics, audit logs, and a dashboard page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.registry import (
    Chain,
    build_dashboard,
    read_chain,
    reconcile_aliases,
    registered_names,
    require_registered,
    versions_with_aliases,
)
from advtrain.runs.folder import write_atomically
from advtrain.tracking.store import open_client, store_errors
from pipelines.workspace import Workspace


@dataclass(frozen=True)
class ModelSummary:
    """A registered model: its versions with their aliases, the oldest first, and its audit log."""

    name: str
    versions: list[tuple[Any, list[str]]]
    chain: Chain


def models(name: str | None, workspace: Workspace, *, progress: Progress = ignore) -> list[ModelSummary]:
    """Return one registered model, or all; repair aliases that disagree with the audit log."""
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        names = registered_names(client)
    if name is not None:
        require_registered(client, name)
        names = [name]
    summaries = []
    for each in names:
        chain = _record(client, each, progress)
        summaries.append(ModelSummary(each, versions_with_aliases(client, each, chain), chain))
    return summaries


def history(name: str, workspace: Workspace, *, repair: bool = True, progress: Progress = ignore) -> Chain:
    """Return every decision about a model, and the faults of its audit log (`faults`).

    Args:
        repair: whether to repair aliases that disagree with the audit log.
    """
    client = open_client(workspace.tracking_uri, must_exist=True)
    require_registered(client, name)
    return _record(client, name, progress) if repair else read_chain(client, name)


def dashboard(workspace: Workspace, out: Path, mlflow_url: str | None = None) -> int:
    """Write the dashboard of all registered models to `out`; return their number.

    Raises:
        UserError: the store cannot be used, or the file cannot be written.
    """
    client = open_client(workspace.tracking_uri, must_exist=True)
    store = workspace.tracking_uri
    url = mlflow_url or (store if store.startswith("http") else "http://127.0.0.1:5000")
    with store_errors(workspace.tracking_uri):
        names = registered_names(client)
    page = build_dashboard(client, names, store, url.rstrip("/"))
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror}") from error
    return len(names)


def _record(client: Any, name: str, progress: Progress) -> Chain:
    """Repair the aliases and return the audit log; a damaged log is only reported."""
    chain = read_chain(client, name)
    if chain.faults:
        progress(Message(f"the audit log of '{name}' is damaged: {'; '.join(chain.faults)}", "error"))
        return chain
    chain, notes = reconcile_aliases(client, name)
    for note in notes:
        progress(Message(f"note: {note}", "note"))
    return chain
