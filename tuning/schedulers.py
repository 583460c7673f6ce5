"""Who ends trials early: successive halving, hyperband, the median rule, population-based training."""

from __future__ import annotations

import random
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from tuning.campaign import Campaign
from tuning.ledger import Ledger, Trial


def build_scheduler(ledger: Ledger) -> TrialScheduler:
    """Return who ends trials early, knowing what closed trials have shown."""
    campaign = ledger.campaign
    chosen, epochs = campaign.ended_by, ledger.plan.base.training.epochs
    if "training.epochs" in campaign.space:
        epochs = int(campaign.space["training.epochs"].extremes()[-1])
    common = {"time_attr": "epoch", "metric": "score", "mode": "max"}
    scheduler: TrialScheduler
    if campaign.search.algorithm == "pbt":
        return _Population(ledger)
    if chosen.kind == "none":
        return FIFOScheduler()
    if chosen.kind == "median":
        scheduler = MedianStoppingRule(grace_period=chosen.grace, min_samples_required=3, **common)
    else:
        scheduler = AsyncHyperBandScheduler(
            max_t=epochs,
            grace_period=min(chosen.grace, epochs),
            reduction_factor=chosen.reduction,
            brackets=_brackets(campaign, epochs) if chosen.kind == "hyperband" else 1,
            **common,
        )
    for trial in ledger.searched:
        if trial.lines():
            past = _Past(trial)
            scheduler.on_trial_add(None, past)
            for line in trial.lines():
                scheduler.on_trial_result(None, past, {"epoch": line["epoch"], "score": campaign.score(line)})
    return scheduler


def _brackets(campaign: Campaign, epochs: int) -> int:
    """Return the number of brackets that differ: the last one ends no trial early."""
    chosen, count = campaign.ended_by, 1
    while chosen.grace * chosen.reduction**count < epochs:
        count += 1
    return count


class _Past:
    """A trial of an earlier sitting, as far as a scheduler asks."""

    def __init__(self, trial: Trial) -> None:
        self.trial_id = trial.label


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training (Jaderberg et al. 2017) that mutates points in raw values, within their bounds."""

    def __init__(self, ledger: Ledger) -> None:
        search = ledger.campaign.search
        self.space = ledger.plan.space
        self.resample = 0.25 if search.resample is None else search.resample
        self.generator = random.Random(search.seed)  # noqa: S311 (nothing secret)
        super().__init__(
            time_attr="epoch",
            metric="score",
            mode="max",
            perturbation_interval=search.interval or 2,
            quantile_fraction=search.quantile or 0.25,
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
