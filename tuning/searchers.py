"""Searchers: each point is computed from the campaign and the trials so far.

A point depends on the trials alone, so a killed campaign resumes from its folder and nothing is lost. A searcher keeps
what it has computed, to save work. Optuna's samplers propose for tpe, nsga2 and bohb, which is tpe under another
scheduler (see `Observations`). The `cmaes` library proposes for cma-es. random and the first points of pbt are plain
random draws. Each draw has its own seed, derived from the campaign's seed and the trial's number.
"""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np

from advtrain.seeding import mix_seed
from tuning.campaign import Campaign
from tuning.observations import EndedTrials, Observations
from tuning.space import Point
from tuning.trials import Trial

#: Default number of random points before tpe's model proposes.
STARTUP = 8
#: Default number of values per continuous path in a grid.
GRID_POINTS = 3
#: Default number of points per generation of nsga2.
POPULATION = 12


class Searcher:
    """Search algorithm of a campaign. It reads each trial that ended once."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self._observations: Observations | None = None
        self._evolution: _Evolution | None = None

    def propose(self, trials: list[Trial]) -> tuple[Point, dict[str, Any]] | None:
        """Return the next point and notes of `suggest`; None also if `trials` use up budget.trials."""
        return None if len(trials) >= self.campaign.budget.trials else self.suggest(trials)

    def suggest(self, trials: list[Trial]) -> tuple[Point, dict[str, Any]] | None:
        """Return the next point and the searcher's notes on it; None if a grid is exhausted.

        Args:
            trials: all trials proposed so far, including running ones. They are those of the last call, then new ones.
        """
        campaign, number = self.campaign, len(trials)
        algorithm, seed = campaign.search.algorithm, mix_seed("search", campaign.search.seed, number) % 2**32
        if algorithm == "grid":
            return _grid_point(campaign, number)
        if algorithm == "cma-es":
            self._evolution = self._evolution or _Evolution(campaign)
            return self._evolution.suggest(trials, seed), {}
        if algorithm in ("random", "pbt"):
            generator = random.Random(seed)  # noqa: S311 (nothing secret)
            return {path: d.draw(generator) for path, d in campaign.space.items()}, {}
        if self._observations is None or not self._observations.has_asked_for(trials):
            self._observations = Observations(campaign)
        self._observations.update(trials)
        return self._observations.ask(_sampler(campaign, self._observations, seed))


def _grid_point(campaign: Campaign, number: int) -> tuple[Point, dict[str, Any]] | None:
    """Return a point of the grid, in which the last path varies fastest; None after the last point."""
    point: Point = {}
    for path, distribution in reversed(campaign.space.items()):
        values = distribution.grid(campaign.search.points or GRID_POINTS)
        number, place = divmod(number, len(values))
        point[path] = values[place]
    return None if number else ({path: point[path] for path in campaign.space}, {})


def _sampler(campaign: Campaign, observations: Observations, seed: int) -> Any:
    """Return a new Optuna sampler."""
    from optuna.exceptions import ExperimentalWarning

    from tuning.samplers import NSGAIISampler, TPESampler

    search, space = campaign.search, observations.distributions
    if search.algorithm == "nsga2":
        population = search.population or POPULATION
        return NSGAIISampler(space, observations.generations, seed=seed, population_size=population)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(
            space,
            seed=seed,
            n_startup_trials=search.n_startup_trials or STARTUP,
            multivariate=True,
            constant_liar=True,
        )


class _Evolution:
    """CMA-ES (Hansen 2016).

    Trials are told in the order in which they ended, one generation at a time. The distribution depends only on them.
    Points drawn from an older distribution, while other trials were running, are treated like the rest.
    """

    def __init__(self, campaign: Campaign) -> None:
        from cmaes import CMA

        self.campaign = campaign
        self.size = campaign.search.population or 4 + int(3 * math.log(len(campaign.space)))
        bounds = np.array([[0.0, 1.0]] * len(campaign.space))
        mean = np.full(len(bounds), 0.5)
        self.optimizer = CMA(mean=mean, sigma=1 / 6, bounds=bounds, population_size=self.size)
        self._ended = EndedTrials()
        self._untold: list[Trial] = []

    def suggest(self, trials: list[Trial], seed: int) -> Point:
        """Return a point that is drawn after an update with the generations that ended."""
        ended = [trial for _, trial in self._ended.take(trials)]
        self._untold += sorted(ended, key=lambda trial: trial.closed or 0)
        while len(self._untold) >= self.size:
            told, self._untold = self._untold[: self.size], self._untold[self.size :]
            self.optimizer.tell(
                [(_unit(self.campaign, trial), _loss(self.campaign, trial)) for trial in told]
            )
        self.optimizer.reseed_rng(seed % 2**31)
        space = self.campaign.space.items()
        drawn = self.optimizer.ask().tolist()
        return {path: d.from_unit(x) for (path, d), x in zip(space, drawn, strict=True)}


def _unit(campaign: Campaign, trial: Trial) -> np.ndarray[Any, Any]:
    return np.array([d.to_unit(trial.point[path]) for path, d in campaign.space.items()])


def _loss(campaign: Campaign, trial: Trial) -> float:
    """Return the loss for CMA-ES, which uses ranks only: any large number is "worst"."""
    best = trial.outcome().best
    return 1e9 if best is None else -campaign.score(best)
