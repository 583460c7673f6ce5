"""Where the loop runs: in this process, or on Ray Train workers that are restarted when they fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from advtrain.cluster import default_device, start_ray
from advtrain.config import Recipe
from advtrain.data import Dataset
from advtrain.lookup import UserError
from advtrain.runfolder import RunFolder
from advtrain.training.loop import Outcome
from advtrain.training.session import Session
from advtrain.training.worker import build_loop, run_guarded, run_worker


def launch(
    recipe: Recipe,
    dataset: Dataset,
    run: RunFolder,
    *,
    address: str | None = None,
    tick: Callable[[], None] = lambda: None,
    interval_s: float = 0.5,
) -> Outcome:
    """Train to the end, a stop or a failure.

    Training runs beside the calling thread, which calls `tick` about twice a second (to track and to show
    progress) and stays free for signals.
    """
    result: list[Outcome | BaseException] = []

    def train() -> None:
        try:
            if recipe.training.num_workers == 0:
                result.append(run_worker(recipe, dataset, run, Session(device=default_device())))
            else:
                result.append(_run_on_ray(recipe, dataset, run))
        except BaseException as error:  # noqa: BLE001 (handed to the calling thread, raised there)
            result.append(error)

    run.clear_stop()
    if recipe.training.num_workers != 0:  # from the calling thread: Ray installs signal handlers
        start_ray(address, recipe.training.max_workers * recipe.training.cpus_per_worker)
    thread = threading.Thread(target=train, name="training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(interval_s)
        tick()
    outcome = result[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _run_on_ray(recipe: Recipe, dataset: Dataset, run: RunFolder) -> Outcome:
    """Run the loop on Ray Train workers, restarting the group after failures."""
    training = recipe.training
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    _check_resources(recipe, use_gpu, ray.cluster_resources())
    workers = training.num_workers
    attempt = len(list((run.path / "ray").glob("attempt-*"))) + 1
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "dataset": ray.put(dataset),
            "run": str(run.path),
        },
        scaling_config=ScalingConfig(
            num_workers=(workers[0], workers[1]) if isinstance(workers, list) else workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        # A fresh name for every attempt: Ray silently returns the old result for a name that it knows,
        # and what to resume from is decided by the run's own checkpoints.
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}) or {"": error}
        first = next(iter(causes.values()))
        return Outcome(
            "failed", f"the workers failed {training.max_failures + 1} times; the last time: {first}"
        )
    outcome: Outcome = result.return_value
    return outcome


def _worker(config: dict[str, Any]) -> Outcome:
    """One rank, inside a Ray Train worker."""
    from pathlib import Path

    import ray
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    session = Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        report=ray.train.report,
    )
    recipe = Recipe.model_validate(config["recipe"])
    torch.set_num_threads(recipe.training.cpus_per_worker)
    try:
        loop = build_loop(recipe, ray.get(config["dataset"]), RunFolder(Path(config["run"])), session)
    except UserError as error:  # the same on every rank and attempt: do not let Ray try again
        return Outcome("failed", str(error))
    # An error from here on may be one rank's alone. It must fail the group: the others wait in a collective.
    return run_guarded(recipe, loop)


def _check_resources(recipe: Recipe, use_gpu: bool, have: dict[str, float]) -> None:
    """Refuse at once what the cluster can never start, instead of waiting for it."""
    workers = recipe.training.num_workers
    need = workers[0] if isinstance(workers, list) else workers
    kind, per_worker = ("GPU", 1) if use_gpu else ("CPU", recipe.training.cpus_per_worker)
    if have.get(kind, 0) < need * per_worker:
        raise UserError(
            f"training.num_workers = {workers} needs {need * per_worker} {kind}s, but the cluster has "
            f"{have.get(kind, 0):g}; lower it with --workers, or add nodes"
        )
