"""Selection of winners: ranking, Pareto front, spread over seeds, user preference."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

from advtrain.errors import UserError
from tuning.campaign import OBJECTIVES, Campaign
from tuning.trials import Ledger, Trial


@dataclass
class Candidate:
    """A trial that may win, with the metrics of its confirmations (trainings with other seeds)."""

    trial: Trial
    campaign: Campaign
    found: dict[str, float]  # its metrics in the search
    confirmations: list[dict[str, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # one reason for each failed or disqualified confirmation
    on_front: bool = False

    @property
    def figures(self) -> dict[str, float]:
        """Validation metrics; for a confirmed trial, their mean over the confirmation seeds.

        The trial's own metrics are then left out, because the trial was selected by them.
        """
        lines = self.confirmations or [self.found]
        return {name: fmean(line[name] for line in lines) for name in self.found if name != "epoch"}

    @property
    def score(self) -> float:
        """Score of the candidate; higher is better."""
        return self.campaign.score(self.figures)

    @property
    def tier(self) -> tuple[bool, bool, bool]:
        """Ranking key before the score: (no failed confirmation, confirmed, trained to the end)."""
        return not self.lost, bool(self.confirmations), self.trial.status == "finished"

    def spread(self, name: str) -> float | None:
        """Return a metric's standard deviation over confirmation seeds; None for fewer than two."""
        values = [line[name] for line in self.confirmations]
        return stdev(values) if len(values) > 1 else None

    @property
    def score_spread(self) -> float | None:
        """Standard deviation of the score over confirmation seeds; None for fewer than two."""
        scores = [self.campaign.score(line) for line in self.confirmations]
        return stdev(scores) if len(scores) > 1 else None


def candidates(ledger: Ledger) -> list[Candidate]:
    """Return the trials that may win, best first.

    Confirmed trials come first, because the best single-seed score of many trials is partly luck. With two
    objectives, the trials on the Pareto front come first within their tier.
    """
    found = _searched(ledger)
    for candidate in found:
        for other in ledger.trials:
            if other.of == candidate.trial.number and other.status != "running":
                line, reason = other.best(), other.disqualified() or other.message
                if line is None or reason:
                    candidate.lost.append(f"seed {other.seed}: {reason}")
                else:
                    candidate.confirmations.append(line)
    return _ranked(found)


def to_confirm(ledger: Ledger) -> list[Candidate]:
    """Return the trials that trained to the end, ranked by their metrics in the search."""
    return [c for c in _ranked(_searched(ledger)) if c.trial.status == "finished"]


def _searched(ledger: Ledger) -> list[Candidate]:
    return [
        Candidate(trial, ledger.campaign, best)
        for trial in ledger.searched
        if trial.status != "running" and not trial.disqualified() and (best := trial.best()) is not None
    ]


def _ranked(found: list[Candidate]) -> list[Candidate]:
    for candidate in found:
        likes = [c.campaign.values(c.figures) for c in found if c.tier == candidate.tier]
        mine = candidate.campaign.values(candidate.figures)
        candidate.on_front = candidate.campaign.pareto and not any(_dominates(x, mine) for x in likes)
    ordered = sorted(found, key=lambda c: (c.tier, c.on_front, c.score), reverse=True)
    for candidate in ordered:  # only the first tier has a Pareto front
        candidate.on_front &= candidate.tier == ordered[0].tier
    return ordered


def _dominates(a: list[float], b: list[float]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Preference:
    """Limit on one objective: a minimum for an accuracy, a maximum for an MAE.

    Candidates that meet it are ranked by the other objectives.
    """

    name: str
    floor: float

    @classmethod
    def parse(cls, text: str, campaign: Campaign) -> Preference:
        """Parse a preference such as `clean=0.98`."""
        short, equals, value = text.partition("=")
        names = [name for name in campaign.objectives if name == short or name.split("_")[0] == short]
        if not campaign.pareto:
            raise UserError("--prefer needs two objectives; this campaign has one objective")
        try:
            if not equals or not names:
                raise ValueError
            floor = float(value)
            if names[0].endswith("accuracy") and not 0 <= floor <= 1:
                raise ValueError
            return cls(names[0], floor)
        except ValueError as error:
            known = ", ".join(name.split("_")[0] for name in campaign.objectives)
            raise UserError(
                f"--prefer takes NAME=VALUE with NAME one of {known}, for example clean=0.98 (got '{text}')"
            ) from error

    def kept_by(self, candidate: Candidate) -> bool:
        """Return whether the candidate meets the limit."""
        sign = 1 if OBJECTIVES[self.name] else -1
        return sign * candidate.figures[self.name] >= sign * self.floor

    def order(self, found: list[Candidate]) -> list[Candidate]:
        """Return the candidates sorted by tier, then by preference.

        Candidates that meet the limit come first, ranked by the other objectives. The rest follow, closest first.
        """
        sign = 1 if OBJECTIVES[self.name] else -1

        def rank(candidate: Candidate) -> tuple[tuple[bool, bool, bool], bool, float]:
            figure = sign * candidate.figures[self.name]
            kept = self.kept_by(candidate)
            values = zip(
                candidate.campaign.objectives, candidate.campaign.values(candidate.figures), strict=True
            )
            others = [value for name, value in values if name != self.name]
            return candidate.tier, kept, sum(others) if kept else figure

        return sorted(found, key=rank, reverse=True)
