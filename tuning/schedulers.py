"""Who ends trials early: successive halving, hyperband, the median rule, population-based training."""

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
    """Return who ends trials early, knowing what closed trials have shown.

    One that was still running when a sitting ended is not among them: it would be judged against itself.
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
    """Return the number of brackets that differ: the first rungs are at grace, grace x reduction, ..."""
    count = 1
    while grace * reduction**count < epochs:
        count += 1
    return count


@dataclass(frozen=True)
class _Past:
    """A trial of an earlier sitting, as far as a scheduler asks."""

    trial_id: str


class _Median(MedianStoppingRule):  # type: ignore[misc]
    """The median rule, which lets a trial go on while there is too little to compare it with."""

    def remember(self, lines: dict[str, list[dict[str, Any]]], campaign: Campaign) -> None:
        """Take what closed trials have shown."""
        for label, shown in lines.items():
            for line in shown:
                result = {"epoch": line["epoch"], "score": campaign.score(line)}
                self._results[_Past(label)].append(result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return str(TrialScheduler.CONTINUE)  # Tune's own pauses it, to be resumed from a copy of its weights


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training (Jaderberg et al. 2017) that mutates points in raw values, within their bounds."""

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
            custom_explore_fn=lambda config: config,  # instead of Tune's mutations, see below
            log_config=False,
        )

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the donor's point mutated, for the trial's own run folder."""
        point = {}
        for path, raw in trial_to_clone.config["trial"]["point"].items():
            fresh = self.generator.random() < self.resample
            distribution = self.space[path]
            point[path] = (
                distribution.draw(self.generator) if fresh else distribution.neighbour(raw, self.generator)
            )
        return {"trial": {"run": trial.config["trial"]["run"], "point": point}}, {}
