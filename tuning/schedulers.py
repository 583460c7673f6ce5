"""Trial schedulers: successive halving, Hyperband, median rule, population-based training."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from tuning.campaign import Campaign
from tuning.trials import Ledger


def build_scheduler(ledger: Ledger) -> TrialScheduler:
    """Return the trial scheduler, initialized with the results of closed trials.

    Trials that are still open are left out, because they would be compared with their own results.
    """
    campaign = ledger.campaign
    chosen, epochs = campaign.ended_by, ledger.plan.base.training.epochs
    if "training.epochs" in campaign.space:
        epochs = int(max(campaign.space["training.epochs"].extremes()))
    common = {"time_attr": "epoch", "metric": "score", "mode": "max"}
    if campaign.search.algorithm == "pbt":
        return _Population(ledger)
    if chosen.kind == "none":
        return FIFOScheduler()
    closed = [trial for trial in ledger.searched if trial.status != "running" and trial.lines()]
    if chosen.kind == "median":
        median = _Median(grace_period=chosen.grace_period or 1, min_samples_required=3, **common)
        median.remember({trial.label: trial.lines() for trial in closed}, campaign)
        return median
    grace, reduction = min(chosen.grace_period or 1, epochs), chosen.reduction_factor or 3
    halving = AsyncHyperBandScheduler(
        max_t=epochs,
        grace_period=grace,
        reduction_factor=reduction,
        brackets=_brackets(grace, reduction, epochs) if chosen.kind == "hyperband" else 1,
        **common,
    )
    for trial in closed:
        past = _Past(trial.label)
        halving.on_trial_add(None, past)
        for line in trial.lines():
            halving.on_trial_result(None, past, {"epoch": line["epoch"], "score": campaign.score(line)})
    return halving


def _brackets(grace: int, reduction: int, epochs: int) -> int:
    """Return the number of Hyperband brackets, whose first rungs differ.

    The first rung of bracket k is at epoch grace x reduction^k.
    """
    count = 1
    while grace * reduction**count < epochs:
        count += 1
    return count


@dataclass(frozen=True)
class _Past:
    """Stand-in for a closed trial, with the only attribute that Tune's schedulers read."""

    trial_id: str


class _Median(MedianStoppingRule):  # type: ignore[misc]
    """Median rule that continues a trial while there are too few others to compare it with."""

    def remember(self, lines: dict[str, list[dict[str, Any]]], campaign: Campaign) -> None:
        """Add the results of closed trials."""
        for label, shown in lines.items():
            for line in shown:
                result = {"epoch": line["epoch"], "score": campaign.score(line)}
                self._results[_Past(label)].append(result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return str(TrialScheduler.CONTINUE)  # Tune's default pauses the trial and resumes it from a copy


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training (Jaderberg et al. 2017).

    Unlike Tune's own version, it mutates the raw values of `tuning/space.py` and keeps them within their bounds.
    """

    def __init__(self, ledger: Ledger) -> None:
        search = ledger.campaign.search
        self.space = ledger.plan.space
        self.resample = 0.25 if search.resample_probability is None else search.resample_probability
        self.generator = random.Random(search.seed)  # noqa: S311 (nothing secret)
        super().__init__(
            time_attr="epoch",
            metric="score",
            mode="max",
            perturbation_interval=search.interval or 2,
            quantile_fraction=search.quantile_fraction or 0.25,
            custom_explore_fn=lambda config: config,  # no mutation by Tune: `_get_new_config` does it
            log_config=False,
        )

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a config with the mutated point of `trial_to_clone` and the trial's own folder."""
        point = {}
        for path, raw in trial_to_clone.config["trial"]["point"].items():
            fresh = self.generator.random() < self.resample
            distribution = self.space[path]
            point[path] = (
                distribution.draw(self.generator) if fresh else distribution.neighbour(raw, self.generator)
            )
        return {"trial": {"run": trial.config["trial"]["run"], "point": point}}, {}
