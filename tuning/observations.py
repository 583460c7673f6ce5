"""Optuna study of a campaign, kept between proposals."""

from __future__ import annotations

from typing import Any

from tuning.campaign import Campaign
from tuning.space import Distribution, Point
from tuning.trials import Trial


class EndedTrials:
    """Trials that ended since the last call, found without a look at those that ended before."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[tuple[int, Trial]] = []

    def take(self, trials: list[Trial]) -> list[tuple[int, Trial]]:
        """Return (position, trial) of each trial that ended since the last call.

        Args:
            trials: the trials of the last call, then new ones.
        """
        self._open += enumerate(trials[self._count :], self._count)
        self._count = len(trials)
        ended = [(place, trial) for place, trial in self._open if trial.status != "running"]
        self._open = [(place, trial) for place, trial in self._open if trial.status == "running"]
        return ended


class Observations:
    """Optuna study of the trials of a campaign.

    With one objective, a trial stopped early is "pruned". tpe ranks pruned trials by how far they trained, then by
    their last score, so its model learns from the longest trainings. This is the idea of bohb (Falkner et al. 2018).
    A failed or disqualified trial is pruned without any score, which ranks last.

    With two objectives Optuna has no pruning, so each trial counts with its best epoch. A failed or disqualified
    trial counts with accuracy 0. For a regression, whose errors are unbounded, it is left out.
    """

    def __init__(self, campaign: Campaign) -> None:
        import optuna

        from tuning.samplers import Generations

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.campaign = campaign
        self.distributions = distributions(campaign)
        self._storage = optuna.storages.InMemoryStorage()
        count = len(campaign.objectives) if campaign.pareto else 1
        self.study = optuna.create_study(storage=self._storage, directions=["maximize"] * count)
        self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
        self.generations = Generations()
        self._ended = EndedTrials()
        self._count = 0
        self._asked: Point | None = None  # point of the last `ask` since `update`

    def ask(self, sampler: Any) -> tuple[Point, dict[str, Any]]:
        """Return the sampler's point for the next trial, and its notes on it.

        The point stays in the study as a running trial. It must be the point of the next trial of `update`.
        """
        self.study.sampler = sampler
        asked = self.study.ask(self.distributions)
        notes = self._storage.get_trial(self._id(self._count)).system_attrs
        self._count += 1
        self._asked = {path: asked.params[d.label(path)] for path, d in self.campaign.space.items()}
        return self._asked, {key: value for key, value in notes.items() if "generation" in key}

    def has_asked_for(self, trials: list[Trial]) -> bool:
        """Return whether a trial has the point of the last `ask`, or nothing was asked for."""
        return self._asked is None or (
            len(trials) >= self._count and trials[self._count - 1].point == self._asked
        )

    def update(self, trials: list[Trial]) -> None:
        """Add new trials, and the results of those that ended since the last call."""
        import optuna

        self._asked = None
        for trial in trials[self._count :]:
            entry = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params={self.campaign.space[path].label(path): raw for path, raw in trial.point.items()},
                distributions=self.distributions,
                system_attrs=trial.notes,
            )
            self.study.add_trial(entry)
        self._count = max(self._count, len(trials))
        for place, trial in self._ended.take(trials):
            self._tell(self._id(place), trial)

    def _tell(self, trial_id: int, trial: Trial) -> None:
        from optuna.trial import TrialState

        campaign, outcome = self.campaign, trial.outcome()
        values = None
        if outcome.best is None and not campaign.pareto:
            state = TrialState.PRUNED
        elif outcome.best is None and any(name.endswith("mae") for name in campaign.objectives):
            state = TrialState.FAIL
        elif outcome.best is None:
            state, values = TrialState.COMPLETE, [0.0] * len(campaign.objectives)
        elif trial.status == "stopped" and not campaign.pareto:
            state = TrialState.PRUNED
        else:
            state = TrialState.COMPLETE
            values = campaign.values(outcome.best) if campaign.pareto else [campaign.score(outcome.best)]
        for line in [] if campaign.pareto else outcome.lines:
            self._storage.set_trial_intermediate_value(trial_id, line["epoch"], campaign.score(line))
        self._storage.set_trial_state_values(trial_id, state, values)
        if state == TrialState.COMPLETE:
            self.generations.add(self._storage.get_trial(trial_id))

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def distributions(campaign: Campaign) -> dict[str, Any]:
    """Return the space as Optuna distributions of raw values, by label."""
    return {d.label(path): _optuna(d) for path, d in campaign.space.items()}


def _optuna(distribution: Distribution) -> Any:
    import optuna

    if distribution.choice is not None:
        return optuna.distributions.CategoricalDistribution(distribution.choice)
    low, high = distribution.bounds
    if distribution.integer is not None:
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=distribution.log)
