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
from advtrain.runfolder import RunFolder, write_atomically
from advtrain.training.loop import Epochs, Outcome
from advtrain.training.session import Session
from advtrain.training.worker import build_loop, drain, run_guarded, run_worker, train_epochs

#: Seconds in which workers that were asked to stop may save and end before they are ended.
STOP_S = 60.0


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
    run.clear_stop()
    if recipe.training.num_workers != 0:  # from the calling thread: Ray installs signal handlers
        start_ray(address, recipe.training.max_workers * recipe.training.cpus_per_worker)
    training = _Beside(recipe, dataset, run)
    while not training.ended(interval_s):
        tick()
    return training.outcome()


def launch_epochs(recipe: Recipe, dataset: Dataset, run: RunFolder) -> Epochs:
    """Train as `launch` does, giving each epoch's metrics as soon as it is done; closed early, it frees the workers.

    On Ray workers training does not wait for whoever takes the metrics.
    """
    if recipe.training.num_workers == 0:
        return (yield from train_epochs(recipe, dataset, run, Session(device=default_device())))
    run.clear_stop()
    seen = len(run.metrics())
    training = _Beside(recipe, dataset, run)
    try:
        ended = False
        while not ended:
            ended = training.ended(0.2)
            lines = run.metrics()
            yield from lines[seen:]
            seen = max(seen, len(lines))
        return training.outcome()
    finally:
        run.request_stop()  # the workers save and end at their next look
        if not training.ended(STOP_S):
            release_workers(run)


class _Beside:
    """A training beside the calling thread."""

    def __init__(self, recipe: Recipe, dataset: Dataset, run: RunFolder) -> None:
        self._result: list[Outcome | BaseException] = []

        def train() -> None:
            try:
                if recipe.training.num_workers == 0:
                    self._result.append(run_worker(recipe, dataset, run, Session(device=default_device())))
                else:
                    self._result.append(_run_on_ray(recipe, dataset, run))
            except BaseException as error:  # noqa: BLE001 (handed to the calling thread, raised there)
                self._result.append(error)

        self._thread = threading.Thread(target=train, name="training", daemon=True)
        self._thread.start()

    def ended(self, wait_s: float) -> bool:
        """Whether it ended, waiting so long for it."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """Return how it ended, or raise the error that ended it."""
        (outcome,) = self._result
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def release_workers(run: RunFolder) -> None:
    """Free the placement group that a run's last worker group took, if whoever started it died before it could.

    Ray Train leaves it behind when its controller is killed with the actor that started it, as Ray Tune does, and
    the next trial waits for ever for resources that nobody uses (ray-project/ray#54305).
    """
    file = run.path / "ray" / "placement-group"
    if not file.exists():
        return
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(file.read_text()))))
    file.unlink(missing_ok=True)


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
    release_workers(run)  # of an attempt that was killed
    attempt = len(list((run.path / "ray").glob("attempt-*"))) + 1
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.values(),
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
    finally:
        (run.path / "ray" / "placement-group").unlink(missing_ok=True)  # Ray Train has freed it
    outcome: Outcome = result.return_value
    return outcome


def _worker(config: dict[str, Any]) -> Outcome:
    """One rank, inside a Ray Train worker."""
    from pathlib import Path

    import ray
    import ray.train
    import ray.util
    from ray.train.torch import get_device

    context = ray.train.get_context()
    session = Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
    )
    group = ray.util.get_current_placement_group()
    if session.rank == 0 and group is not None:
        write_atomically(Path(config["run"]) / "ray" / "placement-group", group.id.hex())
    recipe = Recipe.model_validate(config["recipe"])
    torch.set_num_threads(recipe.training.cpus_per_worker)
    try:
        loop = build_loop(recipe, ray.get(config["dataset"]), RunFolder(Path(config["run"])), session)
    except UserError as error:  # the same on every rank and attempt: do not let Ray try again
        return Outcome("failed", str(error))
    # An error from here on may be one rank's alone. It must fail the group: the others wait in a collective.
    return drain(run_guarded(recipe, loop), ray.train.report)


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
