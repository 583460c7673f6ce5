"""Who won: candidates in order, the Pareto front, the spread over seeds, what a user prefers."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

from advtrain.lookup import UserError
from tuning.campaign import OBJECTIVES, Campaign
from tuning.ledger import Ledger, Trial


@dataclass
class Candidate:
    """A trial that may win, with its confirmations by other seeds."""

    trial: Trial
    campaign: Campaign
    runs: list[dict[str, float]] = field(
        default_factory=list
    )  # figures of the trial, then of each confirmation
    lost: list[str] = field(default_factory=list)  # what became of confirmations that failed or collapsed
    on_front: bool = False

    @property
    def figures(self) -> dict[str, float]:
        """Validation figures, their mean over seeds."""
        return {name: fmean(run[name] for run in self.runs) for name in self.runs[0] if name != "epoch"}

    @property
    def score(self) -> float:
        """What it is ranked by."""
        return self.campaign.score(self.figures)

    @property
    def confirmed(self) -> bool:
        """Whether other seeds were trained."""
        return len(self.runs) > 1

    def spread(self, name: str) -> float | None:
        """Return the standard deviation of a figure over seeds; None of a single one."""
        return stdev(run[name] for run in self.runs) if self.confirmed else None


def candidates(ledger: Ledger) -> list[Candidate]:
    """Return the trials that may win, the best first.

    Confirmed ones come before the others: among many, the best figure of a single seed is high by luck as well. Of
    two objectives those come first that no other beats in one without losing in the other.
    """
    found = []
    for trial in ledger.searched:
        best = trial.best()
        if best is None or trial.status == "running" or trial.disqualified():
            continue
        candidate = Candidate(trial, ledger.campaign, [best])
        for other in ledger.trials:
            if other.of == trial.number and other.status != "running":
                line, reason = other.best(), other.disqualified()
                if line is None or reason:
                    candidate.lost.append(f"seed {other.seed}: {reason}")
                else:
                    candidate.runs.append(line)
        found.append(candidate)
    if ledger.campaign.pareto:
        points = [ledger.campaign.values(c.figures) for c in found]
        for candidate, point in zip(found, points, strict=True):
            candidate.on_front = not any(_dominates(other, point) for other in points)
    return sorted(found, key=lambda c: (c.confirmed, c.on_front, c.score), reverse=True)


def _dominates(a: list[float], b: list[float]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Preference:
    """A floor on one objective: of those above it, the best in the others."""

    name: str
    floor: float

    @classmethod
    def parse(cls, text: str, campaign: Campaign) -> Preference:
        """Read `clean=0.98`."""
        short, equals, value = text.partition("=")
        names = [name for name in campaign.objectives if name == short or name.split("_")[0] == short]
        if not campaign.pareto:
            raise UserError("--prefer picks along a Pareto front; this campaign has one objective")
        try:
            if not equals or not names:
                raise ValueError
            return cls(names[0], float(value))
        except ValueError as error:
            known = ", ".join(name.split("_")[0] for name in campaign.objectives)
            raise UserError(
                f"--prefer takes NAME=VALUE with NAME of {known}, as clean=0.98, not '{text}'"
            ) from error

    def order(self, found: list[Candidate]) -> list[Candidate]:
        """Return the candidates that keep to it, the best in the other objective first, then the nearest ones."""
        sign = 1 if OBJECTIVES[self.name] else -1

        def rank(candidate: Candidate) -> tuple[bool, float]:
            figure = sign * candidate.figures[self.name]
            kept = figure >= sign * self.floor
            others = [
                (1 if OBJECTIVES[name] else -1) * value
                for name, value in candidate.figures.items()
                if name in candidate.campaign.objectives and name != self.name
            ]
            return kept, sum(others) if kept else figure

        return sorted(found, key=rank, reverse=True)
