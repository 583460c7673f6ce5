"""Number of trials that fit on the cluster at the same time."""

from __future__ import annotations

import time

import ray

from advtrain.cluster import ray_is_local, workers_take_gpus
from advtrain.errors import UserError
from tuning.campaign import Campaign
from tuning.trials import Ledger


class TrialSlots:
    """Number of trials that fit on the cluster now, updated as nodes join and leave."""

    def __init__(self, ledger: Ledger) -> None:
        training = ledger.plan.base.training
        self.workers = max(1, training.min_workers)
        self.gpus = int(workers_take_gpus(training.accelerator))
        # With a named accelerator one trial is always requested, so that Ray waits for a matching node.
        self.least = 0 if training.accelerator == "auto" or ray_is_local() else 1
        self.bundle = {"CPU": float(training.cpus_per_worker), **({"GPU": 1.0} if self.gpus else {})}
        self._asked, self._trials = 0.0, 0

    def check(self, campaign: Campaign) -> None:
        """Raise UserError if no trial fits, or if GPU hours are limited on a cluster without GPUs."""
        if self.trials() < 1:
            lacking, remedy = "not enough nodes of the cluster have", "add nodes"
            if ray_is_local():
                lacking, remedy = "this machine does not have", "name a larger cluster with --address"
            raise UserError(
                f"a trial needs {self.needs}, but {lacking} these resources; lower training.num_workers or "
                f"training.cpus_per_worker under base, or {remedy}"
            )
        if campaign.budget.gpu_hours is not None and not self.gpus:
            raise UserError("budget.gpu_hours has no effect on a cluster without GPUs; use wall or trials")

    @property
    def needs(self) -> str:
        """Resources of one trial, as text for messages."""
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        return each if self.workers == 1 else f"{self.workers} workers with {each} each"

    def trials(self) -> int:
        """Return the number of trials that fit now; query the cluster at most once a second."""
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._trials = trials_that_fit(nodes, self.bundle, self.workers)
        return max(self._trials, self.least)


def trials_that_fit(nodes: list[dict[str, float]], bundle: dict[str, float], workers: int) -> int:
    """Return how many trials fit on the nodes, each with `workers` workers.

    Nodes may differ. A worker needs its whole bundle on one node.
    """
    slots = [min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in nodes]
    return sum(slots) // workers
