"""Samplers of Optuna, without a search of all trials for known facts."""

from __future__ import annotations

from bisect import insort
from typing import Any

import optuna

#: Attribute of a trial with its generation, as Optuna names it.
GENERATION = "NSGAIISampler:generation"


class TPESampler(optuna.samplers.TPESampler):
    """TPE with a given space.

    Optuna computes the space from those of all trials.
    """

    def __init__(self, space: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self._space = space

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """Return the space in the order of the names."""
        return _in_order(self._space)


class Generations:
    """Completed trials of each generation, and the parents that were selected from them."""

    def __init__(self) -> None:
        self.population: dict[int, list[Any]] = {}
        self.parents: list[list[Any]] = []  # by generation; parents[0] is empty

    def add(self, trial: Any) -> None:
        """Add a completed trial, and drop the parents of later generations, which may now differ."""
        generation = trial.system_attrs.get(GENERATION)
        if generation is not None:
            insort(self.population.setdefault(generation, []), trial, key=lambda other: other.number)
            del self.parents[generation + 1 :]


class NSGAIISampler(optuna.samplers.NSGAIISampler):
    """NSGA-II with a given space, and with the population and the parents of `Generations`.

    Optuna keeps the parents of a generation even if a trial of the generation before ends later. Here such a trial
    counts, so that a resumed campaign proposes the same points. The class has Optuna's name, which is part of
    `GENERATION`.
    """

    def __init__(self, space: dict[str, Any], generations: Generations, **options: Any) -> None:
        super().__init__(**options)
        self._space, self._generations = space, generations

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """Return the space in the order of the names."""
        return _in_order(self._space)

    def get_population(self, study: Any, generation: int) -> list[Any]:
        """Return the completed trials of a generation, in the order of their numbers."""
        return list(self._generations.population.get(generation, []))

    def get_parent_population(self, study: Any, generation: int) -> list[Any]:
        """Return the parents of a generation; select those of earlier ones first, without recursion."""
        parents = self._generations.parents
        for missing in range(len(parents), generation + 1):
            parents.append(self.select_parent(study, missing) if missing else [])
        return parents[generation]


def _in_order(space: dict[str, Any]) -> dict[str, Any]:
    """Return the space in the order of the names, without what has one value."""
    return {name: space[name] for name in sorted(space) if not space[name].single()}
