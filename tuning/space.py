"""Search space: a distribution for each recipe path, and recipes from points of the space.

A point holds raw values, which `Distribution.value` maps to recipe values. They differ only for
`one_minus_loguniform`: raw is 1 - value, on a logarithmic scale, for rates near 1 such as beta2.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from advtrain.errors import UserError, nearest
from advtrain.recipe import Recipe, override, parse_recipe
from advtrain.recipe.lengths import is_length
from advtrain.schema import Config, Number, parse_relative

#: Raw values by path.
Point = dict[str, Any]
#: Maximum number of corner points that are validated, sampled if there are more. A quarter as many random points are
#: validated too.
CHECKED = 256


class Distribution(Config):
    """Distribution of one recipe path; exactly one field is set."""

    uniform: list[Number] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], uniform"""
    loguniform: list[Number] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], uniform in the logarithm"""
    one_minus_loguniform: list[Number] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high] of 1 - value, uniform in the logarithm: [1e-4, 1e-1] means values from 0.9 to 0.9999"""
    integer: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """[low, high], whole numbers, both included"""
    choice: list[Any] | None = Field(default=None, min_length=2)
    """list of values to choose from"""

    @model_validator(mode="after")
    def _one_and_in_order(self) -> Self:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"takes exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is None:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{kinds[0]}: low must be below high (got [{low:g}, {high:g}])")
            if self.log and low <= 0:
                raise ValueError(f"{kinds[0]}: low must be above 0 (got {low:g})")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest raw value; (0, 0) for a choice."""
        low, high = self.uniform or self.loguniform or self.one_minus_loguniform or self.integer or (0, 0)
        return low, high

    @property
    def log(self) -> bool:
        """True if raw values lie on a logarithmic scale."""
        return self.loguniform is not None or self.one_minus_loguniform is not None

    def value(self, raw: Any) -> Any:
        """Return the recipe value of a raw value."""
        return 1 - raw if self.one_minus_loguniform is not None else raw

    def raw(self, value: Any) -> Any:
        """Return the raw value of a recipe value."""
        return 1 - value if self.one_minus_loguniform is not None else value

    def label(self, path: str) -> str:
        """Return the axis label for raw values of `path`."""
        return f"1 - {path}" if self.one_minus_loguniform is not None else path

    def from_unit(self, share: float) -> Any:
        """Return the raw value at a share in [0, 1] of the range; not defined for a choice."""
        low, high = self.bounds
        if share <= 0 or share >= 1:  # the exact ends, without rounding
            return low if share <= 0 else high
        if self.log:
            return math.exp(math.log(low) + share * math.log(high / low))
        if self.integer is not None:
            return min(int(high), int(low + share * (high - low + 1)))
        return low + share * (high - low)

    def to_unit(self, raw: Any) -> float:
        """Return the share in [0, 1] of the range at a raw value; not defined for a choice."""
        low, high = self.bounds
        if self.log:
            return math.log(raw / low) / math.log(high / low)
        if self.integer is not None:
            return float((raw - low + 0.5) / (high - low + 1))
        return float((raw - low) / (high - low))

    def grid(self, points: int) -> list[Any]:
        """Return `points` raw values, evenly spaced from low to high.

        A choice returns all its values. An integer range with fewer values returns all of them.
        """
        if self.choice is not None:
            return list(self.choice)
        if self.integer is not None:
            return sorted({round(x) for x in np.linspace(*self.bounds, points)})
        return [self.from_unit(share) for share in np.linspace(0, 1, points)]

    def extremes(self) -> list[Any]:
        """Return both ends of the range, or every value of a choice."""
        return list(self.choice) if self.choice is not None else self.grid(2)

    def draw(self, generator: random.Random) -> Any:
        """Return a random raw value."""
        return (
            generator.choice(self.choice) if self.choice is not None else self.from_unit(generator.random())
        )

    def neighbour(self, raw: Any, generator: random.Random) -> Any:
        """Return a raw value times 0.8 or 1.2, within the bounds, or an adjacent choice."""
        if self.choice is not None:
            place = self.choice.index(raw) + generator.choice((-1, 1))
            return self.choice[min(len(self.choice) - 1, max(0, place))]
        low, high = self.bounds
        moved = min(high, max(low, raw * generator.choice((0.8, 1.2))))
        if self.integer is not None:  # change by at least one
            step = max(1, abs(round(moved - raw)))
            moved = min(high, max(low, raw + (step if moved >= raw else -step)))
        return moved


Space = dict[str, Distribution]


def settings(space: Space, point: Point) -> dict[str, Any]:
    """Return the recipe settings of a point, as path -> value."""
    return {path: space[path].value(raw) for path, raw in point.items()}


def with_settings(base: Recipe, changes: dict[str, Any], where: str, *, allow_code: bool = False) -> Recipe:
    """Return a copy of the recipe with `changes` (path -> value) applied.

    Raises:
        UserError: the result is not a valid recipe.
    """
    values = base.values()
    override(values, changes)
    return parse_recipe(values, where, allow_code=allow_code)


def check_space(space: Space, base: Recipe, *, allow_code: bool) -> None:
    """Check that all paths may be searched and that the space gives valid recipes only.

    Raises:
        UserError: a path is unknown (the message names the nearest one), a path must be the same for all trials, or
            a point gives an invalid recipe (the message shows it).
    """
    known = [path for path, _, _ in base.leaves()]
    for path in space:
        if path not in known and not path.startswith("model.args."):
            raise UserError(f"space: unknown path '{path}'{nearest(path, known)}")
        if path.startswith(("evaluation.", "guard.")):
            raise UserError(f"space: '{path}' is part of the evaluation, which all trials share")
        if path.startswith("data.") and not path.startswith("data.augment."):
            raise UserError(f"space: '{path}' would change the splits that all trials are compared on")
        if path in ("seed", "name", "description"):
            raise UserError(
                f"space: '{path}' cannot be searched; confirm.seeds trains winners with other seeds"
            )
        if path in (
            "training.num_workers",
            "training.cpus_per_worker",
            "training.changes",
        ):
            raise UserError(f"space: '{path}' is the same for all trials")
    _check_units(space, base)
    for point in _examples(space):
        _recipe_at(base, settings(space, point), allow_code=allow_code)


def _check_units(space: Space, base: Recipe) -> None:
    """Raise if a length of the attack is relative to embeddings in some trials, and a number in others."""
    for path, value, _ in base.leaves():
        if not is_length(path):
            continue
        values = [value, *(space[path].extremes() if path in space else [])]
        relative = [parse_relative(each) is not None for each in values if each is not None]
        if any(relative) and not all(relative):
            raise UserError(
                f"space: {path} is {', '.join(map(str, values))} in the recipe and the space; write all of them as "
                "multiples of the embedding norm, such as 0.5x, or all as numbers"
            )


def combinations(
    space: Space, base: Recipe, varied: Iterable[str], *, allow_code: bool
) -> Iterator[tuple[str, Recipe]]:
    """Yield every combination of the extremes of some paths, as text and as a recipe.

    All other paths of the space have their first extreme.

    Raises:
        UserError: a combination is no valid recipe; `check_space` checks only a sample of a large space.
    """
    first = {path: distribution.extremes()[0] for path, distribution in space.items()}
    paths = [path for path in space if path in set(varied)]
    for values in itertools.product(*(space[path].extremes() for path in paths)):
        changes = settings(space, first | dict(zip(paths, values, strict=True)))
        recipe = _recipe_at(base, changes, allow_code=allow_code)
        yield _shown({path: changes[path] for path in paths}), recipe


def _recipe_at(base: Recipe, changes: dict[str, Any], *, allow_code: bool) -> Recipe:
    try:
        return with_settings(base, changes, "recipe", allow_code=allow_code)
    except UserError as error:
        raise UserError(f"space: {_shown(changes)} is no valid recipe: {error}") from error


def _shown(changes: dict[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in changes.items())


def _examples(space: Space) -> list[Point]:
    """Return all corner points, or a sample of them, and random points."""
    generator = random.Random(0)  # noqa: S311 (nothing secret)
    ends = [d.extremes() for d in space.values()]
    if math.prod(map(len, ends)) <= CHECKED:
        found = list(itertools.product(*ends))
    else:
        found = [tuple(map(generator.choice, ends)) for _ in range(CHECKED)]
    found += [tuple(d.draw(generator) for d in space.values()) for _ in range(CHECKED // 4)]
    return [dict(zip(space, values, strict=True)) for values in found]
