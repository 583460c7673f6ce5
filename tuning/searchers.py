"""The next point, as a function of the campaign and of what its trials have shown so far; nothing else is kept.

So a campaign that was killed goes on as it would have, from its folder alone: no searcher's state is stored, and
none can be lost. Optuna's samplers propose (tpe, nsga2; bohb is tpe again, see `build_study`), the `cmaes` library
for cma-es, plain draws for random and pbt's first points. Each draw has a seed of its own, from the campaign's and
the trial's number.
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

#: Random points before tpe's model proposes any.
STARTUP = 8
#: Values of each continuous path in a grid.
GRID_POINTS = 3
#: Points of a generation of nsga2.
POPULATION = 12


def suggest(campaign: Campaign, trials: list[Trial]) -> tuple[Point, dict[str, Any]] | None:
    """Return the next point and the searcher's notes on it; None if a grid is used up.

    Args:
        campaign: says who proposes.
        trials: all trials that were proposed so far, running ones among them.
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


def _ask(campaign: Campaign, trials: list[Trial], seed: int) -> tuple[Point, dict[str, Any]]:
    """Let an Optuna sampler propose."""
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
    """Return the space as Optuna has it, raw values under their labels."""
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
    """Return an Optuna study that knows the trials.

    With one objective a trial that was ended early is "pruned": tpe ranks such trials by how far they came, then by
    their last figure, so its model learns from the longest trainings that it has, which is the idea of bohb
    (Falkner et al. 2018). One that failed or was disqualified is pruned before it showed anything, which is the worst
    there can be. With two, which know no pruning, each counts by its best epoch, and such a one with no accuracy at
    all; of a regression, whose errors have no bound, it is left out.
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
    """CMA-ES (Hansen 2016): tell the trials in the order in which they ended, a generation at a time, then draw.

    The distribution depends on what it was told alone, so nothing needs to be kept. Points that were drawn from an
    older one, while others were still running, are told like the rest.
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
    """Return the score to be lowered; CMA-ES looks at ranks only, so any large number is "worst"."""
    best = trial.best()
    return 1e9 if best is None or trial.disqualified() else -campaign.score(best)
