"""Checks of `advtrain doctor`: one line each, with a repair for what does not work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from advtrain.cluster import cluster_address, ray_is_up
from advtrain.environment import available_cores, library_versions
from advtrain.errors import UserError
from advtrain.recipe.data import TEXT_FILES, TORCHVISION_FILES
from pipelines.workspace import Workspace


class IncompleteError(Exception):
    """Something optional is missing. The message names the repair."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: its name, its verdict, and the finding or the repair."""

    name: str
    verdict: Literal["ok", "warn", "FAIL"]
    message: str


def check_all(workspace: Workspace) -> Iterator[CheckResult]:
    """Run all checks; yield each result as soon as it is available.

    With a cluster, each of its nodes is checked, too.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", lambda: ", ".join(f"{k} {v}" for k, v in library_versions().items())),
        ("cores", lambda: f"{available_cores()}"),
        ("GPUs", _gpus),
        ("Ray", lambda: _ray(workspace.address)),
        ("tracking store", lambda: _store(workspace.tracking_uri)),
        ("run folder", lambda: _writable(workspace.runs)),
        ("data", lambda: _data(workspace.data_root)),
    ]
    for name, check in checks:
        try:
            yield CheckResult(name, "ok", check())
        except IncompleteError as error:
            yield CheckResult(name, "warn", str(error))
        except UserError as error:
            yield CheckResult(name, "FAIL", str(error))
    if cluster_address(workspace.address) and ray_is_up():
        yield from _nodes(workspace)


def _nodes(workspace: Workspace) -> Iterator[CheckResult]:
    from pipelines.node_checks import check_nodes, server_of

    checked = "; the run folder is shared" + ", and MLflow answers" * any(server_of(workspace.tracking_uri))
    for node, versions, problems in check_nodes(workspace.runs, workspace.tracking_uri):
        message = "; ".join(problems) or f"{versions}{checked}"
        yield CheckResult(f"node {node}", "FAIL" if problems else "ok", message)


def _gpus() -> str:
    import torch

    count = torch.cuda.device_count()
    if not count:
        return "none; training uses the CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))


def _ray(address: str | None) -> str:
    from advtrain.cluster import start_ray

    start_ray(address)
    import ray

    resources = ray.cluster_resources()
    cluster = cluster_address(address)
    where = f"cluster at {cluster}" if cluster else "local cluster started"
    return f"{where}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def _store(uri: str) -> str:
    from advtrain.tracking.store import REGISTRY_URI, open_client

    client = open_client(uri)
    name = "advtrain-doctor"
    try:
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        if experiment and experiment.lifecycle_stage == "deleted":  # by the previous `advtrain doctor`
            client.restore_experiment(experiment_id)
        run = client.create_run(experiment_id)
        client.log_metric(run.info.run_id, "writable", 1.0)
        client.delete_run(run.info.run_id)
        client.delete_experiment(experiment_id)
    except Exception as error:
        raise UserError(f"{uri} can be read but not written: {error}") from error
    registry = os.environ.get(REGISTRY_URI)
    return f"{uri}, reachable and writable" + (f"; registry {registry}, reachable" if registry else "")


def _writable(folder: Path) -> str:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    probe = existing / ".advtrain-doctor"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"'{existing}' is not writable ({error.strerror}); choose another folder with --runs"
        ) from error
    free = shutil.disk_usage(existing).free / 2**30
    if free < 1:
        raise UserError(f"'{existing}' has {free:.1f} GiB left; make room, or choose another one with --runs")
    return f"{folder}, {free:.0f} GiB free"


def _data(root: Path) -> str:
    found = [name for name, place in TORCHVISION_FILES.items() if (root / place).exists()]
    missing = [name for name in TORCHVISION_FILES if name not in found]
    texts = [name for name, place in TEXT_FILES.items() if (root / place).exists()]
    inside = (", ".join([*found, *texts]) or "no torchvision data set") if root.is_dir() else "no such folder"
    text = f"digits (ships with scikit-learn); in {root}: {inside}"
    if missing:
        raise IncompleteError(
            f"{text}; for {', '.join(missing)} use --data-root, or --set data.download=true"
        )
    return text
