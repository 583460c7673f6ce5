"""How many trials the cluster takes at a time."""

from __future__ import annotations

import time

import ray

from advtrain.cluster import workers_take_gpus
from advtrain.errors import UserError
from tuning.campaign import Campaign
from tuning.trials import Ledger


class TrialSlots:
    """How many trials the cluster takes at a time, as nodes come and go."""

    def __init__(self, ledger: Ledger) -> None:
        training = ledger.plan.base.training
        workers = training.num_workers
        self.workers = max(1, workers[0] if isinstance(workers, list) else workers)
        self.gpus = int(workers_take_gpus(training.accelerator))
        self.least = (
            0 if training.accelerator == "auto" else 1
        )  # what is to be waited for has to be asked for
        self.bundle = {"CPU": float(training.cpus_per_worker), **({"GPU": 1.0} if self.gpus else {})}
        self._asked, self._trials = 0.0, 0

    def check(self, campaign: Campaign) -> None:
        """Refuse a campaign of which no trial fits, or whose budget bounds nothing here."""
        if self.trials() < 1:
            raise UserError(
                f"a trial needs {self.needs}, and no node of the cluster, or not enough of them, has it; lower "
                "training.num_workers or training.cpus_per_worker under base, or add nodes"
            )
        if campaign.budget.gpu_hours is not None and not self.gpus:
            raise UserError("budget.gpu_hours bounds nothing on a cluster without GPUs; use wall or trials")

    @property
    def needs(self) -> str:
        """What one trial takes, in words."""
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        return each if self.workers == 1 else f"{self.workers} workers with {each} each"

    def trials(self) -> int:
        """Return the number of trials that have room at a time, asking the cluster once a second."""
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._trials = trials_that_fit(nodes, self.bundle, self.workers)
        return max(self._trials, self.least)


def trials_that_fit(nodes: list[dict[str, float]], bundle: dict[str, float], workers: int) -> int:
    """Return how many trials of so many workers fit on nodes that differ; a worker does not straddle two."""
    slots = [min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in nodes]
    return sum(slots) // workers
