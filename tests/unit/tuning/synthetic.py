"""Synthetic trials in memory, which count how often their files are read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.unit.tuning.surface import CAMPAIGN, height
from tuning.campaign import Campaign, parse_campaign
from tuning.trials import Trial

TWO = {"objectives": {"robust_accuracy": "max", "clean_accuracy": "max"}}


@dataclass
class Reads:
    """Number of reads of the files of trials."""

    metrics: int = 0


@dataclass
class SyntheticRun:
    """Run folder in memory."""

    name: str
    reads: Reads
    figures: list[tuple[float, float]] = field(default_factory=list)  # (robust, clean) of each epoch

    def metrics(self) -> list[dict[str, Any]]:
        self.reads.metrics += 1
        return [
            {"epoch": epoch, "val_robust_accuracy": robust, "val_clean_accuracy": clean}
            for epoch, (robust, clean) in enumerate(self.figures, 1)
        ]

    def recoveries(self) -> list[dict[str, Any]]:
        return []


class SyntheticLedger(SimpleNamespace):
    """Ledger in memory, with the attributes that selection and search read."""

    def __init__(self, campaign: Campaign) -> None:
        super().__init__(campaign=campaign, searched=[], confirmations={}, ended=0, reads=Reads(), name="c")

    @property
    def trials(self) -> list[Trial]:
        return [*self.searched, *self.confirmations.values()]

    def begin(
        self, point: dict[str, Any], notes: dict[str, Any], of: Trial | None = None, seed: int = 0
    ) -> Trial:
        number = len(self.searched) if of is None else of.number
        run: Any = SyntheticRun(f"t{number}-{seed}", self.reads)
        if of is None:
            trial = Trial(run, number, point, notes)
            self.searched.append(trial)
        else:
            trial = self.confirmations[number, seed] = Trial(run, number, point, notes, seed, number)
        return trial

    def close(self, trial: Trial, status: str = "finished") -> None:
        trial.status, trial.closed = status, self.ended
        self.ended += 1


def campaign_of(changes: dict[str, Any] | None = None) -> Campaign:
    """Return the campaign of the known surface, with changed keys."""
    return parse_campaign(CAMPAIGN | {"budget": {"trials": 10**6}} | (changes or {}), "here")


def run_trial(
    ledger: SyntheticLedger, generator: random.Random, statuses: Sequence[str] = ("finished",)
) -> Trial:
    """Add a random trial that ended; its accuracies are multiples of 1/100, so some are equal."""
    point = {path: d.draw(generator) for path, d in ledger.campaign.space.items()}
    trial = ledger.begin(point, {})
    trial.run.figures = [(round(generator.random(), 2), round(generator.random(), 2))]
    ledger.close(trial, generator.choice(statuses))
    return trial


def measure(trial: Trial, epochs: int = 2) -> None:
    """Give a trial the accuracies of its point on the surface."""
    robust = height(trial.point)
    trial.run.figures = [(robust * epoch / epochs, 1 - robust / 2) for epoch in range(1, epochs + 1)]
