"""Who won: candidates in order, the Pareto front, the spread over seeds, what a user prefers."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, stdev

from advtrain.errors import UserError
from tuning.campaign import OBJECTIVES, Campaign
from tuning.trials import Ledger, Trial


@dataclass
class Candidate:
    """A trial that may win, with its confirmations by other seeds."""

    trial: Trial
    campaign: Campaign
    found: dict[str, float]  # its figures in the search
    confirmations: list[dict[str, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what became of confirmations that did not end well
    on_front: bool = False

    @property
    def figures(self) -> dict[str, float]:
        """Validation figures: once confirmed the mean over the other seeds, as the search's own was selected."""
        lines = self.confirmations or [self.found]
        return {name: fmean(line[name] for line in lines) for name in self.found if name != "epoch"}

    @property
    def score(self) -> float:
        """What it is ranked by."""
        return self.campaign.score(self.figures)

    @property
    def tier(self) -> tuple[bool, bool, bool]:
        """What comes before any figure: that no seed was lost, that others confirmed it, that it trained to the end."""
        return not self.lost, bool(self.confirmations), self.trial.status == "finished"

    def spread(self, name: str) -> float | None:
        """Return the standard deviation of a figure over the other seeds; None of fewer than two."""
        values = [line[name] for line in self.confirmations]
        return stdev(values) if len(values) > 1 else None


def candidates(ledger: Ledger) -> list[Candidate]:
    """Return the trials that may win, the best first.

    Confirmed ones come before the others: among many, the best figure of a single seed is high by luck as well. Of
    two objectives those come first, among their like, that no other beats in one without losing in the other.
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
    """Return the trials that trained to the end, the best first by what the search saw of them."""
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
    for candidate in ordered:  # there is one front: that of those who come first
        candidate.on_front &= candidate.tier == ordered[0].tier
    return ordered


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
            floor = float(value)
            if names[0].endswith("accuracy") and not 0 <= floor <= 1:
                raise ValueError
            return cls(names[0], floor)
        except ValueError as error:
            known = ", ".join(name.split("_")[0] for name in campaign.objectives)
            raise UserError(
                f"--prefer takes NAME=VALUE with NAME of {known}, as clean=0.98, not '{text}'"
            ) from error

    def kept_by(self, candidate: Candidate) -> bool:
        """Whether the candidate is on the right side of the floor."""
        sign = 1 if OBJECTIVES[self.name] else -1
        return sign * candidate.figures[self.name] >= sign * self.floor

    def order(self, found: list[Candidate]) -> list[Candidate]:
        """Return the candidates that keep to it, the best in the other objective first, then the nearest ones."""
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
