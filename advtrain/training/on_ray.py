"""Training on Ray Train, which restarts the worker group after failures."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import Any

import psutil
import ray
import ray.train
import ray.util
from ray import PlacementGroupID
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from advtrain.cluster import limit_threads, put_shared, ray_is_local, workers_take_gpus
from advtrain.data import Dataset
from advtrain.environment import check_interfaces, drop_launcher, tune_malloc, warn_after
from advtrain.errors import UserError
from advtrain.recipe import Recipe
from advtrain.runs.folder import OF_WORKERS, RunFolder, sync, write_atomically
from advtrain.runs.object_store import WHICH_STORE
from advtrain.runs.storage import opened, ray_storage, shared_place
from advtrain.schema import parse_duration
from advtrain.training.failures import (
    Failure,
    begin_attempt,
    describe_failures,
    version_mismatch,
    versions_here,
)
from advtrain.training.loop import Outcome
from advtrain.training.session import Session
from advtrain.training.worker import build_loop, drain, run_guarded

logger = logging.getLogger(__name__)

#: Parts of gloo and NCCL error messages: the connection to another rank was lost, or another rank timed out.
_GONE = ("connection reset", "connection closed", "broken pipe", "remote process exited")
_SILENT = ("timed out", "timeout")
#: Attributes of Ray errors that hold the underlying error.
_WRAPPED = ("health_check_failure", "_base_exc", "cause")
#: Retries of a worker group that lacks resources, each of RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S (60 s): time for a
#: node to return or for an autoscaler to add one.
START_FAILURES = 30
#: Seconds until a warning that no worker group has started.
BUSY_S = 60.0
#: Files of the run that a rank needs.
_NEEDED = ("recipe.yaml", "interruption.json", "checkpoints/*", "start/*", *OF_WORKERS)
#: Seconds between checks whether an elastic group can grow; each change costs a restart.
RESIZE_S = 60.0


def _resize_seconds() -> float:
    """Return $ADVTRAIN_RESIZE_S, or its default."""
    given = os.environ.get("ADVTRAIN_RESIZE_S") or RESIZE_S
    try:
        seconds = parse_duration(given, bare=True)
    except ValueError as error:
        raise UserError(f"$ADVTRAIN_RESIZE_S '{given}' {error}") from error
    if not isinstance(seconds, float | int) or seconds <= 0:
        raise UserError(f"$ADVTRAIN_RESIZE_S must be above 0 (got '{given}')")
    return float(seconds)


def train_on_ray(recipe: Recipe, dataset: Dataset, run: RunFolder) -> Outcome:
    """Run the loop on Ray Train workers, restarting the group after failures."""
    training = recipe.training
    use_gpu = workers_take_gpus(training.accelerator)
    _check_resources(recipe, use_gpu, ray.cluster_resources())
    workers = training.num_workers
    run.fetch()
    run.watch()
    release_workers(run)  # resources reserved by a killed attempt
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.values(),
            "dataset": put_shared(dataset),
            "run": shared_place(run.path),
            "versions": versions_here(recipe.model.name),
            "store": {name: os.environ[name] for name in WHICH_STORE if name in os.environ},
        },
        scaling_config=ScalingConfig(
            num_workers=(workers[0], workers[1]) if isinstance(workers, list) else workers,
            elastic_resize_monitor_interval_s=_resize_seconds(),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=_Torch(backend="nccl" if use_gpu else "gloo", timeout_s=training.timeout_s),
        # A new name for every attempt, because Ray returns the old result for a known name. Resuming does not need
        # Ray's name: it uses the checkpoints in the run folder.
        run_config=RunConfig(
            name=f"attempt-{time.time_ns() // 1_000_000}",
            **ray_storage(run.path / "ray"),
            failure_config=FailureConfig(
                max_failures=training.max_failures, controller_failure_limit=START_FAILURES
            ),
            callbacks=[_FailureRecorder(shared_place(run.path))],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    attempts = len(run.attempts())
    try:
        with warn_after(BUSY_S, lambda: _why_waiting(recipe, use_gpu, len(run.attempts()) - attempts)):
            result = trainer.fit()
    except ControllerError as error:
        cause = getattr(error.controller_failure, "cause", None)  # what a worker raised
        reason = str(cause) if isinstance(cause, UserError) else _last_line(error)
        return Outcome("failed", f"no worker group could be started: {reason}")
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}) or {0: error}
        first = describe_failures({rank: _failure(cause) for rank, cause in causes.items()}, [])
        return Outcome(
            "failed", f"the workers failed {training.max_failures + 1} times; the last time: {first}"
        )
    except RayError as error:
        first = str(error).strip().split("\n")[0][:160]
        return Outcome("failed", f"the Ray cluster is gone ({first}); all checkpoints are kept")
    finally:
        run.fetch()  # download the last files of the workers
        (run.path / "ray" / "placement-group").unlink(missing_ok=True)  # Ray Train has freed it
    outcome: Outcome = result.return_value
    return outcome


def release_workers(run: RunFolder) -> None:
    """Remove the placement group of the run's last worker group, if one is left.

    Ray Train does not remove it when its controller is killed with the actor that started it, as Ray Tune does. The
    next trial would then wait for these resources without end (ray-project/ray#54305).
    """
    sync(run.path, ("ray/placement-group",))
    file = run.path / "ray" / "placement-group"
    if not file.exists():
        return
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(file.read_text()))))
    file.unlink(missing_ok=True)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's process group on the network interface that Ray itself uses."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set the network interface and create the process group."""
        worker_group.execute(_prepare_network, backend_config.backend)
        super().on_start(worker_group, backend_config)


class _Torch(TorchConfig):  # type: ignore[misc]
    """Ray's torch configuration with `_Backend`."""

    @property
    def backend_cls(self) -> type:
        """Backend class that creates the process group."""
        return _Backend


def _prepare_network(backend: str) -> None:
    """Set gloo's network interface to that of this node's Ray address; check one that the user has set.

    By default gloo resolves the host name, which may give a local address.
    """
    drop_launcher()  # left where `ray start` ran
    ip = ray.util.get_node_ip_address()
    check_interfaces(backend, f"node {ip}")
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _FailureRecorder(UserCallback):  # type: ignore[misc]
    """Callback in Ray Train's controller that records why a worker group failed."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the failure that ended an attempt."""
        causes = {rank: _failure(error) for rank, error in worker_exceptions.items()}
        # An error here would end the run, so recording may fail silently.
        with suppress(Exception), opened(self.run, fetched=("attempts.jsonl",), patience_s=10) as path:
            attempts = RunFolder(path).attempts()
            nodes = attempts[-1]["nodes"] if attempts else []
            RunFolder(path).note_interruption(describe_failures(causes, nodes))


def _failure(error: BaseException) -> Failure:
    """Classify the error that ended a rank. torch.distributed errors differ only in their text."""
    while not isinstance(error, RayActorError):
        inner = next((getattr(error, name) for name in _WRAPPED if hasattr(error, name)), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    if isinstance(error, RayActorError):
        return Failure("died", "died: its process was killed or crashed, or its node was lost")
    first = str(error).strip().split("\n")[0][:200]
    if isinstance(error, RuntimeError):  # from torch.distributed
        if any(word in first.lower() for word in _SILENT):
            return Failure("timeout", "timed out waiting for another worker")
        if any(word in first.lower() for word in _GONE):
            return Failure("connection_lost", "lost its connection to another worker")
    return Failure("error", f"failed ({type(error).__name__}: {first})")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _worker(config: dict[str, Any]) -> Outcome:
    """Run one rank inside a Ray Train worker."""
    context = ray.train.get_context()
    session = Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        node=ray.util.get_node_ip_address(),
        notice=_notice,
    )
    remarks: list[str] = []
    tune_malloc()
    os.environ |= {name: value for name, value in config["store"].items() if name not in os.environ}
    with opened(config["run"], _NEEDED, watched=("stop",), tell=remarks.append) as path:
        return _train(config, RunFolder(path), session, remarks)


def _train(config: dict[str, Any], run: RunFolder, session: Session, remarks: list[str]) -> Outcome:
    """Train on one rank with an open run folder; `remarks` has messages for the user."""
    group = ray.util.get_current_placement_group()
    if session.rank == 0 and group is not None:
        (run.path / "ray").mkdir(exist_ok=True)
        write_atomically(run.path / "ray" / "placement-group", group.id.hex())
    nodes = session.gather(session.node)
    versions = session.gather(versions_here(config["recipe"]["model"]["name"]))
    if differences := version_mismatch(config["versions"], versions, nodes):
        return Outcome("failed", differences)
    recipe = Recipe.model_validate(config["recipe"])
    limit_threads(recipe.training.cpus_per_worker)
    try:
        loop = build_loop(recipe, ray.get(config["dataset"]), run, session)
        if session.rank == 0:
            alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
            remarks += loop.remarks + begin_attempt(run, nodes, alive, loop.state.step)
            loop.remarks = remarks
        begun = session.gather((loop.state.step, loop.config.recipe_digest))
    except UserError as error:  # the same on every rank and attempt, so Ray must not retry
        return Outcome("failed", str(error))
    if len(set(begun)) > 1:  # the store changed between two reads: let Ray retry
        raise RuntimeError(f"the ranks found different checkpoints, at (step, recipe) {begun}")
    # An error on one rank must fail the group, because the other ranks wait in a collective.
    return drain(run_guarded(recipe, loop), ray.train.report)


def _notice() -> str | None:
    """Return the preemption notice for any of our nodes, or None. Collective call."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    ranks = ", ".join(map(str, info.preempted_ranks))
    return (
        f"preemption notice for the node of rank {ranks}: saving checkpoints until it leaves, "
        "then continuing without it"
    )


def _why_waiting(recipe: Recipe, use_gpu: bool, started: int) -> str:
    """Return what the workers wait for; "" if a worker group has started."""
    if started:
        return ""
    free = ray.available_resources()
    kinds = ("GPU", "CPU") if use_gpu else ("CPU",)
    return (
        f"waiting for {recipe.training.min_workers} workers: "
        f"{' and '.join(f'{free.get(kind, 0):g} {kind}s' for kind in kinds)} are free on the cluster"
    )


def _check_resources(recipe: Recipe, use_gpu: bool, have: dict[str, float]) -> None:
    """Raise if the cluster lacks resources; log a warning if training is to wait for them."""
    training = recipe.training
    each = {**({"GPU": 1} if use_gpu else {}), "CPU": training.cpus_per_worker}
    need = {kind: training.min_workers * amount for kind, amount in each.items()}
    kind = next((kind for kind, amount in need.items() if have.get(kind, 0) < amount), None)
    if kind is None:
        return
    if training.accelerator != "auto" and not ray_is_local():
        logger.warning(
            "waiting for nodes: %d workers need %d %ss, and the cluster has %g",
            training.min_workers,
            need[kind],
            kind,
            have.get(kind, 0),
        )
        return
    remedy = "lower it with --workers, "
    if kind == "CPU" and training.cpus_per_worker > 1:
        remedy += "lower training.cpus_per_worker, "
    if ray_is_local():
        remedy += "or name a larger cluster with --address"
    else:
        kinds = "gpu" if use_gpu else "cpu"
        remedy += f"add nodes, or set training.accelerator={kinds} to wait for an autoscaler to add them"
    raise UserError(
        f"training.num_workers = {training.num_workers} needs {need[kind]} {kind}s, but the cluster has "
        f"{have.get(kind, 0):g}; {remedy}"
    )
