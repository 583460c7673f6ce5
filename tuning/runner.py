"""Driver of a campaign: proposes trials, runs them on Ray Tune, records the results."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from advtrain.cluster import put_shared, start_ray
from advtrain.data import Dataset
from advtrain.runs.storage import forget, ray_storage, shared_place
from advtrain.seeding import mix_seed
from advtrain.training.on_ray import release_workers
from tuning import searchers
from tuning.concurrency import TrialSlots
from tuning.schedulers import build_scheduler
from tuning.trainable import TrialTrainable
from tuning.trials import Ledger, Trial

#: Ray Tune's settings; the user's environment variables take precedence.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders already hold this data
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C stops at once; finished work is on disk
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own checkpoints are never read
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Tune would copy the driver's AWS keys into each trial's runtime environment, which Ray logs in plain text on every
# node (tested in tests/integration/test_storage.py). Nodes have their own keys.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
)
#: Minimal resource bundle. Tune requires one, but Ray Train reserves the resources of a trial with workers itself.
_TICKET = {"memory": 64 * 2**20}


class Watcher(Protocol):
    """Receiver of trial events, in the driver's process."""

    def began(self, trial: Trial) -> None:
        """Handle a trial that is about to train."""

    def on_result(self, trial: Trial, result: dict[str, Any]) -> None:
        """Handle the metrics of an epoch."""

    def ended(self, trial: Trial) -> None:
        """Handle a trial that was closed."""


def run_trials(ledger: Ledger, dataset: Dataset, watcher: Watcher, address: str | None) -> None:
    """Search until the budget is spent; resume the open trials of an earlier session first."""
    queue = [trial for trial in ledger.searched if trial.status == "running"]
    searcher = searchers.Searcher(ledger.campaign)

    def next_trial() -> Trial | None:
        proposed = searcher.propose(ledger.searched)
        return None if proposed is None else ledger.begin(*proposed, dataset=dataset)

    _run(ledger, dataset, watcher, address, queue, next_trial, build_scheduler(ledger))


def run_confirmations(
    ledger: Ledger, dataset: Dataset, watcher: Watcher, address: str | None, wanted: list[tuple[Trial, int]]
) -> None:
    """Train each (trial, seed) pair that does not exist yet, to the end."""
    there = ledger.confirmations
    left = [(trial, seed) for trial, seed in wanted if (trial.number, seed) not in there]
    queue = [trial for trial in there.values() if trial.status == "running"]

    def next_trial() -> Trial | None:
        if not left:
            return None
        trial, seed = left.pop(0)
        return ledger.begin(trial.point, {}, of=trial, seed=seed, dataset=dataset)

    _run(ledger, dataset, watcher, address, queue, next_trial, None)


def _run(
    ledger: Ledger,
    dataset: Dataset,
    watcher: Watcher,
    address: str | None,
    queue: list[Trial],
    next_trial: Callable[[], Trial | None],
    scheduler: TrialScheduler | None,
) -> None:
    """Run trials; without a scheduler, train each to the end and ignore the budget.

    The budget limits the search only, not the confirmations.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    training, campaign = ledger.plan.base.training, ledger.campaign
    start_ray(address)
    room = TrialSlots(ledger)
    room.check(campaign)
    # By default only one actor may start at a time, so short trials would all run in the first one.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(room.trials())
    driver = _Driver(ledger, watcher, queue, next_trial, room, bounded=scheduler is not None)
    attempt = len(list((ledger.folder / "tune").glob("attempt-*.log"))) + 1
    seed = mix_seed("tune", campaign.search.seed, attempt) % 2**32
    np.random.seed(seed)  # Tune's ASHA draws the bracket of each trial from it
    random.seed(seed)  # Tune's PBT draws the trial to clone from it
    # Tune's population-based training takes no searcher: all its trials are added at once and run in turns.
    population = isinstance(scheduler, PopulationBasedTraining)
    configs = list(iter(driver.next_config, None)) if population else []
    if population and not configs:
        driver.close_the_rest()
        return
    trainable = tune.with_parameters(
        TrialTrainable, campaign=campaign, dataset=[put_shared(dataset)], allow_code=ledger.plan.allow_code
    )
    bundle = _TICKET if training.num_workers else room.bundle
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([bundle])),
        param_space={"trial": tune.grid_search(configs)} if population else {},
        tune_config=tune.TuneConfig(
            search_alg=None if population else driver.searcher,
            scheduler=scheduler or FIFOScheduler(),
            num_samples=1 if population else -1,  # the searcher signals when it has no more trials
            reuse_actors=training.num_workers == 0,
        ),
        run_config=_run_config(ledger, driver, attempt),
    )
    try:
        with _log_to(ledger.folder / "tune" / f"attempt-{attempt}.log"):
            tuner.fit()
    finally:
        driver.spend()
        for trial in ledger.trials:  # Tune gives an actor ten seconds to exit; workers may need longer
            release_workers(trial.run)
    driver.close_the_rest()
    forget(ledger.folder / "tune" / f"attempt-{attempt}")  # Tune's own files are never read


def _run_config(ledger: Ledger, driver: _Driver, attempt: int) -> Any:
    """Return Tune's run configuration for one session."""
    return tune.RunConfig(
        name=f"attempt-{attempt}",
        **ray_storage(ledger.folder / "tune"),
        callbacks=[driver],
        stop=driver.stopper,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has them
        failure_config=tune.FailureConfig(max_failures=ledger.campaign.max_failures),
        verbose=0,
    )


@contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """Redirect Tune's log to a file, so the terminal shows no traceback for each failure."""
    file.parent.mkdir(exist_ok=True)
    logger, handler = logging.getLogger("ray.tune"), logging.FileHandler(file)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        handler.close()


class _Driver(tune.Callback):  # type: ignore[misc]
    """Tune callback that supplies trials and alone writes their records (`Ledger`)."""

    def __init__(
        self,
        ledger: Ledger,
        watcher: Watcher,
        queue: list[Trial],
        next_trial: Callable[[], Trial | None],
        room: TrialSlots,
        *,
        bounded: bool,
    ) -> None:
        self.bounded = bounded
        self.ledger, self.watcher, self.room = ledger, watcher, room
        self.queue, self.next_trial = queue, next_trial
        self.open: dict[str, Trial] = {}
        self.searcher, self.stopper = _Feed(self), _Budget(self)
        self.spent = {"wall": 0.0, "gpu": 0.0} | ledger.facts()["spent"]
        self.since = time.monotonic()

    def next_config(self) -> dict[str, Any] | None:
        """Return the next trial's config, or None if there are no more trials."""
        if self.over_budget():
            return None
        trial = self.queue.pop(0) if self.queue else self.next_trial()
        if trial is None:
            return None
        place = shared_place(trial.run.path)
        self.open[place] = trial
        self.watcher.began(trial)
        trial.run.fetch()
        return {"run": place, "point": self.ledger.point(trial)}

    def over_budget(self) -> bool:
        """Return whether the wall time or the GPU hours of the budget are used up."""
        wall = self.spent["wall"] + time.monotonic() - self.since
        return self.bounded and self.ledger.over_budget(self.spent | {"wall": wall})

    def spend(self) -> None:
        """Add the wall time since the last call to the recorded budget use, and save it."""
        now = time.monotonic()
        self.spent["wall"] += now - self.since
        self.since = now
        self.ledger.update(spent=self.spent)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass the metrics of an epoch to the watcher."""
        del iteration, trials, info
        self.spent["gpu"] += result["time_this_iter_s"] * self.room.gpus * max(1, result["num_workers"])
        self.spend()
        mine = self.open[trial.config["trial"]["run"]]
        mine.run.fetch(whole=False)
        self.watcher.on_result(mine, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close a trial that ended by itself or was stopped by the scheduler or the budget."""
        del iteration, trials, info
        last = trial.last_result or {}
        mine = self.open.pop(trial.config["trial"]["run"])
        if last.get("failure"):
            self._close(mine, "failed", str(last["failure"]))
        elif last.get("done_by_itself"):
            self._close(mine, "finished")
        else:
            who = "the budget" if self.over_budget() else self.ledger.campaign.ended_by.kind
            self._close(mine, "stopped", f"ended by {who} after epoch {last.get('epoch')}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close a trial that has no retries left."""
        del iteration, trials, info
        mine = self.open.pop(trial.config["trial"]["run"])
        release_workers(mine.run)
        mine.run.fetch()
        file = mine.run.path / "error.txt"
        reason = (
            file.read_text().strip()[:500] if file.exists() else "its process died; see tune/attempt-*.log"
        )
        self._close(mine, "failed", f"failed {trial.num_failures} times; the last time: {reason}")

    def _close(self, trial: Trial, status: str, message: str = "") -> None:
        trial.run.fetch()
        self.ledger.close(trial, status, message)
        self.spend()
        self.watcher.ended(trial)

    def close_the_rest(self) -> None:
        """Close the trials that the budget stopped, during training or before they started."""
        for trial in [*self.open.values(), *self.queue]:
            self._close(trial, "stopped", "ended by the budget")
        self.open.clear()
        self.queue.clear()


class _Feed(Searcher):  # type: ignore[misc]
    """Tune searcher that takes its trials from the driver."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(metric="score", mode="max")
        self.driver = driver

    def suggest(self, trial_id: str) -> Any:
        """Return a config, None if no trial fits now, or FINISHED."""
        del trial_id
        if len(self.driver.open) >= self.driver.room.trials():
            return None
        config = self.driver.next_config()
        return Searcher.FINISHED if config is None else {"trial": config}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the driver records the results."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: proposals depend on the trials alone, which are on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, see `save`."""


class _Budget(tune.Stopper):  # type: ignore[misc]
    """Stopper that ends all trials when the wall time or the GPU hours are used up."""

    def __init__(self, driver: _Driver) -> None:
        self.driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: the budget never stops a single trial."""
        del trial_id, result
        return False

    def stop_all(self) -> bool:
        """Return whether the campaign is over its budget."""
        return self.driver.over_budget()
