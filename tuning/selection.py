"""Selection of winners: ranking, Pareto front, spread over seeds, user preference."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from statistics import fmean, stdev

from advtrain.errors import UserError
from tuning.campaign import OBJECTIVES, Campaign
from tuning.trials import Ledger, Trial

#: Values of two objectives, with signs such that higher is better.
Point = tuple[float, float]
#: See `Candidate.tier`.
Tier = tuple[bool, bool, bool]


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
    def point(self) -> Point:
        """Values of two objectives with a Pareto front; else the score, and 0."""
        if not self.campaign.pareto:
            return self.score, 0.0
        first, second = self.campaign.values(self.figures)
        return first, second

    @property
    def tier(self) -> Tier:
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
    ranking = Ranking(ledger)
    return _ranked(list(ranking.found.values()))


def to_confirm(ledger: Ledger) -> list[Candidate]:
    """Return the trials that trained to the end, ranked by their metrics in the search."""
    found = [c for trial in ledger.searched if (c := _candidate(trial, ledger.campaign)) is not None]
    return [c for c in _ranked(found) if c.trial.status == "finished"]


def _candidate(trial: Trial, campaign: Campaign) -> Candidate | None:
    """Read a trial that the searcher proposed; return None if it is open or cannot win."""
    best = None if trial.status == "running" else trial.outcome().best
    return None if best is None else Candidate(trial, campaign, best)


def _ranked(found: list[Candidate]) -> list[Candidate]:
    """Mark the candidates on the Pareto front of the first tier, and return all, best first."""
    tiers: dict[Tier, _Peers] = {}
    for candidate in found:
        tiers.setdefault(candidate.tier, _Peers()).add(candidate)
    for candidate in found:
        candidate.on_front = candidate.campaign.pareto and tiers[candidate.tier].has_on_front(candidate)
    ordered = sorted(found, key=lambda c: (c.tier, c.on_front, c.score), reverse=True)
    for candidate in ordered:  # only the first tier has a Pareto front
        candidate.on_front &= candidate.tier == ordered[0].tier
    return ordered


class Ranking:
    """Trials of a campaign that may win, kept as trials end. Each trial is read once."""

    def __init__(self, ledger: Ledger) -> None:
        self.campaign = ledger.campaign
        self.found: dict[int, Candidate] = {}  # by the trial's number
        self._tiers: dict[Tier, _Peers] = {}
        for trial in ledger.trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """Add a trial that ended; one that is open is ignored."""
        if trial.of is None:
            if (candidate := _candidate(trial, self.campaign)) is not None:
                self.found[trial.number] = candidate
                self._tiers.setdefault(candidate.tier, _Peers()).add(candidate)
            return
        confirmed = self.found.get(trial.of)
        if confirmed is None or trial.status == "running":
            return
        self._tiers[confirmed.tier].remove(confirmed)
        outcome = trial.outcome()
        if reason := outcome.reason or trial.message:
            confirmed.lost.append(f"seed {trial.seed}: {reason}")
        elif outcome.best is not None:
            confirmed.confirmations.append(outcome.best)
        self._tiers.setdefault(confirmed.tier, _Peers()).add(confirmed)

    def best(self) -> Candidate | None:
        """Return the first trial of `candidates`; None if no trial may win."""
        first = max((tier for tier, peers in self._tiers.items() if peers.members), default=None)
        return None if first is None else self._tiers[first].best()


class _Peers:
    """Candidates of one tier and their Pareto front. With one objective, the front is the best score."""

    def __init__(self) -> None:
        self.members: dict[int, Candidate] = {}  # by the trial's number
        self._front: ParetoFront | None = ParetoFront()  # None: to be computed again
        self._first: dict[
            Point, int
        ] = {}  # lowest number of a trial with this point, for points on the front

    def add(self, candidate: Candidate) -> None:
        number, point = candidate.trial.number, candidate.point
        self.members[number] = candidate
        if self._front is not None and self._front.add(point):
            self._first[point] = min(number, self._first.get(point, number))

    def remove(self, candidate: Candidate) -> None:
        del self.members[candidate.trial.number]
        self._front = None

    def has_on_front(self, candidate: Candidate) -> bool:
        return candidate.point in self._current()

    def best(self) -> Candidate:
        scored = [self.members[self._first[point]] for point in self._current().points]
        return max(scored, key=lambda candidate: (candidate.score, -candidate.trial.number))

    def _current(self) -> ParetoFront:
        if self._front is None:
            self._front, self._first = ParetoFront(), {}
            for candidate in self.members.values():
                self.add(candidate)
        return self._front


class ParetoFront:
    """Pareto front of points with two values, both to be maximized; equal points are all on it."""

    def __init__(self) -> None:
        self.points: list[Point] = []  # the first value increases, the second decreases

    def add(self, point: Point) -> bool:
        """Add a point and remove those that it dominates; return whether it is on the front."""
        place = bisect_left(self.points, point)
        if place < len(self.points) and self.points[place][1] >= point[1]:
            return self.points[place] == point
        first = place
        while first > 0 and self.points[first - 1][1] <= point[1]:
            first -= 1
        self.points[first:place] = [point]
        return True

    def __contains__(self, point: Point) -> bool:
        place = bisect_left(self.points, point)
        return place < len(self.points) and self.points[place] == point


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

        def rank(candidate: Candidate) -> tuple[Tier, bool, float]:
            figure = sign * candidate.figures[self.name]
            kept = self.kept_by(candidate)
            values = zip(
                candidate.campaign.objectives, candidate.campaign.values(candidate.figures), strict=True
            )
            others = [value for name, value in values if name != self.name]
            return candidate.tier, kept, sum(others) if kept else figure

        return sorted(found, key=rank, reverse=True)
