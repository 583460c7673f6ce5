"""Searchers: each point is computed from the campaign and the trials so far.

Searchers are stateless, so a killed campaign resumes from its folder alone and nothing is lost. Optuna's samplers
propose for tpe, nsga2 and bohb, which is tpe under another scheduler (see `build_study`). The `cmaes` library
proposes for cma-es. random and the first points of pbt are plain random draws. Each draw has its own seed, derived
from the campaign's seed and the trial's number.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import numpy as np

from advtrain.seeding import mix_seed
from tuning.campaign import Campaign
from tuning.space import Distribution, Point
from tuning.trials import Trial

#: Default number of random points before tpe's model proposes.
STARTUP = 8
#: Default number of values per continuous path in a grid.
GRID_POINTS = 3
#: Default number of points per generation of nsga2.
POPULATION = 12


def suggest(campaign: Campaign, trials: list[Trial]) -> tuple[Point, dict[str, Any]] | None:
    """Return the next point and the searcher's notes on it; None if a grid is exhausted.

    Args:
        campaign: the campaign, with its search algorithm and space.
        trials: all trials proposed so far, including running ones.
    """
    algorithm, number = campaign.search.algorithm, len(trials)
    seed = mix_seed("search", campaign.search.seed, number) % 2**32
    if algorithm == "grid":
        values = [d.grid(campaign.search.points or GRID_POINTS) for d in campaign.space.values()]
        found = next(itertools.islice(itertools.product(*values), number, None), None)
        return None if found is None else (dict(zip(campaign.space, found, strict=True)), {})
    if algorithm == "cma-es":
        return _evolve(campaign, trials, seed), {}
    if algorithm in ("random", "pbt"):
        generator = random.Random(seed)  # noqa: S311 (nothing secret)
        return {path: d.draw(generator) for path, d in campaign.space.items()}, {}
    return _ask(campaign, trials, seed)


def propose(campaign: Campaign, trials: list[Trial]) -> tuple[Point, dict[str, Any]] | None:
    """Return the next point and notes of `suggest`; None also if `trials` use up budget.trials."""
    return None if len(trials) >= campaign.budget.trials else suggest(campaign, trials)


def _ask(campaign: Campaign, trials: list[Trial], seed: int) -> tuple[Point, dict[str, Any]]:
    """Return a point proposed by an Optuna sampler, and the sampler's notes."""
    import optuna

    search = campaign.search
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: Any
        if search.algorithm == "nsga2":
            sampler = optuna.samplers.NSGAIISampler(
                seed=seed, population_size=search.population or POPULATION
            )
        else:
            sampler = optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=search.n_startup_trials or STARTUP,
                multivariate=True,
                constant_liar=True,
            )
        study = build_study(campaign, trials, sampler)
        asked = study.ask(distributions(campaign))
    notes = {key: value for key, value in study.trials[-1].system_attrs.items() if "generation" in key}
    return {path: asked.params[d.label(path)] for path, d in campaign.space.items()}, notes


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


def build_study(campaign: Campaign, trials: list[Trial], sampler: Any = None) -> Any:
    """Return an Optuna study that contains the trials.

    With one objective, a trial stopped early is "pruned". tpe ranks pruned trials by how far they trained, then by
    their last score, so its model learns from the longest trainings. This is the idea of bohb (Falkner et al. 2018).
    A failed or disqualified trial is pruned without any score, which ranks last.

    With two objectives Optuna has no pruning, so each trial counts with its best epoch. A failed or disqualified
    trial counts with accuracy 0. For a regression, whose errors are unbounded, it is left out.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    count = len(campaign.objectives) if campaign.pareto else 1
    study = optuna.create_study(directions=["maximize"] * count, sampler=sampler)
    known = distributions(campaign)
    for trial in trials:
        entry: dict[str, Any] = {
            "params": {campaign.space[path].label(path): raw for path, raw in trial.point.items()},
            "distributions": known,
            "system_attrs": trial.notes,
        }
        best, reason = trial.best(), trial.status != "running" and trial.disqualified()
        if not campaign.pareto and not reason:
            entry["intermediate_values"] = {line["epoch"]: campaign.score(line) for line in trial.lines()}
        if reason and not campaign.pareto:
            entry["state"] = TrialState.PRUNED
        elif reason and any(name.endswith("mae") for name in campaign.objectives):
            entry["state"] = TrialState.FAIL
        elif reason:
            entry |= {"state": TrialState.COMPLETE, "values": [0.0] * count}
        elif trial.status == "running" or best is None:
            entry["state"] = TrialState.RUNNING
        elif trial.status == "stopped" and not campaign.pareto:
            entry["state"] = TrialState.PRUNED
        else:
            values = campaign.values(best) if campaign.pareto else [campaign.score(best)]
            entry |= {"state": TrialState.COMPLETE, "values": values}
        study.add_trial(optuna.trial.create_trial(**entry))
    return study


def _evolve(campaign: Campaign, trials: list[Trial], seed: int) -> Point:
    """Return a point drawn by CMA-ES (Hansen 2016).

    Ended trials are replayed in the order in which they ended, one generation at a time. The distribution depends
    only on them, so no state is stored. Points drawn from an older distribution, while other trials were running,
    are treated like the rest.
    """
    from cmaes import CMA

    size = campaign.search.population or 4 + int(3 * math.log(len(campaign.space)))
    bounds = np.array([[0.0, 1.0]] * len(campaign.space))
    optimizer = CMA(
        mean=np.full(len(bounds), 0.5), sigma=1 / 6, bounds=bounds, seed=seed % 2**31, population_size=size
    )
    ended = sorted((t for t in trials if t.closed is not None), key=lambda trial: trial.closed or 0)
    for start in range(0, len(ended) - size + 1, size):
        optimizer.tell(
            [(_unit(campaign, trial), _loss(campaign, trial)) for trial in ended[start : start + size]]
        )
    drawn = optimizer.ask()
    return {path: d.from_unit(x) for (path, d), x in zip(campaign.space.items(), drawn.tolist(), strict=True)}


def _unit(campaign: Campaign, trial: Trial) -> np.ndarray[Any, Any]:
    return np.array([d.to_unit(trial.point[path]) for path, d in campaign.space.items()])


def _loss(campaign: Campaign, trial: Trial) -> float:
    """Return the loss for CMA-ES, which uses ranks only: any large number is "worst"."""
    best = trial.best()
    return 1e9 if best is None or trial.disqualified() else -campaign.score(best)
