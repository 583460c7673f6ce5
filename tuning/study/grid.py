"""Study grid: data sets x architectures x optimizers x methods x seeds, one recipe per cell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from advtrain.documents import read_yaml
from advtrain.errors import UserError, nearest
from advtrain.recipe import Recipe, parse_recipe, set_path
from advtrain.recipe.explain import explain_all
from advtrain.schema import Config

Axis = Literal["dataset", "architecture", "optimizer", "method"]
AXES: tuple[Axis, ...] = ("dataset", "architecture", "optimizer", "method")

#: Settings of a recipe: sections, or paths such as `optimizer.lr`.
Settings = dict[str, Any]
#: Keys of an entry that name another training, and the recipe paths that get its run.
NEEDS = {"teacher": "objective.teacher", "start": "model.from"}


class QuickConfig(Config):
    """Part of a study that `--quick` keeps."""

    datasets: list[str] | None = None
    """entries kept; null: all"""
    architectures: list[str] | None = None
    """entries kept; null: all"""
    optimizers: list[str] | None = None
    """entries kept; null: all"""
    methods: list[str] | None = None
    """entries kept; null: all"""
    seeds: list[int] | None = None
    """seeds kept; null: all"""
    base: Settings = Field(default_factory=dict)
    """settings applied last, on top of all others"""


class Study(Config):
    """Grid of recipes, and the baseline that its rows are compared with."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")
    """name of the study, its folder and its MLflow experiment"""
    description: str = ""
    """one-line description"""
    base: Settings = Field(default_factory=dict)
    """settings of every cell"""
    sources: dict[str, Settings] = Field(default_factory=dict)
    """name -> settings of a whole recipe without `base`; it is trained first, once, if a cell names it. An entry of any
    axis names one by `start: NAME`, which sets model.from, or `teacher: NAME`, which sets objective.teacher"""
    datasets: dict[str, Settings] = Field(min_length=1)
    """name -> settings; each gets its own table. `seeds` in the settings replaces the study's seeds"""
    architectures: dict[str, Settings] = Field(min_length=1)
    """name -> settings"""
    optimizers: dict[str, Settings] = Field(min_length=1)
    """name -> settings"""
    methods: dict[str, Settings] = Field(min_length=1)
    """name -> settings; `teacher` and `start` may also name a method, for its run of the same cell"""
    seeds: list[int] = Field(min_length=1)
    """seeds that each grid point is trained with"""
    baseline: dict[Axis, str]
    """axis and entry that the axis's other entries are compared with, for example {method: madry}"""
    gap_samples: int = Field(default=1000, ge=1)
    """number of training samples attacked to measure the generalization gap"""
    quick: QuickConfig = QuickConfig()
    """part of the study that --quick keeps"""

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for axis, name in self.baseline.items():
            if name not in self.entries(axis):
                raise ValueError(f"baseline.{axis} '{name}' is no {axis}{nearest(name, self.entries(axis))}")
        if len(self.baseline) != 1:
            raise ValueError("baseline names one axis and its entry, for example {method: madry}")
        for axis in AXES:
            for name in getattr(self.quick, f"{axis}s") or []:
                if name not in self.entries(axis):
                    raise ValueError(
                        f"quick.{axis}s '{name}' is no {axis}{nearest(name, self.entries(axis))}"
                    )
        if both := sorted(set(self.sources) & set(self.methods)):
            raise ValueError(f"'{both[0]}' is both a source and a method; rename one of them")
        if wrong := [
            f"{name}.{key}" for name, found in self.sources.items() for key in NEEDS if key in found
        ]:
            raise ValueError(f"sources.{wrong[0]}: a source cannot need another training")
        known = [*self.sources, *self.methods]
        for where, settings in self._layers():
            for key in NEEDS:
                if key in settings and (name := str(settings[key])) not in known:
                    raise ValueError(
                        f"{where}.{key} '{name}' is neither a source nor a method{nearest(name, known)}"
                    )
        return self

    def _layers(self) -> Iterator[tuple[str, Settings]]:
        """Yield the settings of the base and of every entry, with their place in the file."""
        yield "base", self.base
        for axis in AXES:
            for name, settings in self.entries(axis).items():
                yield f"{axis}s.{name}", settings

    def entries(self, axis: str) -> dict[str, Settings]:
        """Return the entries of an axis."""
        found: dict[str, Settings] = getattr(self, f"{axis}s")
        return found

    def quickly(self) -> Study:
        """Return the quick version of the study, named `NAME-quick`."""
        kept: dict[str, Any] = {"name": f"{self.name}-quick"}
        for axis in AXES:
            names = getattr(self.quick, f"{axis}s")
            if names is not None:
                kept[f"{axis}s"] = {name: self.entries(axis)[name] for name in names}
        if self.quick.seeds is not None:
            kept["seeds"] = self.quick.seeds
        return self.model_copy(update=kept)


@dataclass(frozen=True)
class Cell:
    """One training: a grid point or a source, its recipe, and the trainings that it needs."""

    dataset: str
    architecture: str
    optimizer: str
    method: str
    seed: int
    recipe: Recipe
    needs: dict[str, str] = field(default_factory=dict)  # key of NEEDS -> name of a source or method
    is_source: bool = False  # `method` is the name of a source

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Grid point without the seed, which is one row of the report."""
        return (self.dataset, self.architecture, self.optimizer, self.method)

    @property
    def name(self) -> str:
        """Name of the cell's folder, from its row, its seed and the digest of its recipe."""
        row = re.sub(r"[^\w.-]+", "_", "-".join(self.row))
        return f"{row}-s{self.seed}-{self.recipe.digest()[:6]}"

    def needed(self, grid: list[Cell]) -> dict[str, Cell]:
        """Return the cells of `grid` that must be trained before, by recipe path.

        Raises:
            UserError: the quick form of the study leaves such a cell out.
        """
        found = {}
        for key, name in self.needs.items():
            named = (other for other in grid if other.method == name)
            cell = next(
                (c for c in named if c.is_source or (c.row[:3], c.seed) == (self.row[:3], self.seed)), None
            )
            if cell is None or cell.needs:
                problem = "is left out by quick" if cell is None else f"needs the training of {key} itself"
                raise UserError(f"{key} '{name}' of method '{self.method}' {problem}")
            found[NEEDS[key]] = cell
        return found


def load_study(path: Path, *, quick: bool) -> Study:
    """Read and check a study file.

    Raises:
        UserError: the file is missing or not YAML, or a key, type or name is not allowed.
    """
    try:
        study = Study.model_validate(read_yaml(path, "study"))
    except ValidationError as error:
        raise UserError(explain_all(error.errors(), str(path), Study)) from error
    return study.quickly() if quick else study


def cells(study: Study, *, quick: bool, allow_code: bool) -> list[Cell]:
    """Return all cells with valid recipes: sources, cells that need no other, and the others.

    Raises:
        UserError: the settings of a cell give an invalid recipe; the message names the cell.
    """
    last = study.quick.base if quick else {}
    sources = {name: _source(study, name, last, allow_code) for name in study.sources}
    found = []
    rows = list(itertools.product(*(study.entries(axis) for axis in AXES)))
    for seed, (dataset, architecture, optimizer, method) in _seeded(study, rows, quick):
        settings = [study.base, study.datasets[dataset], study.architectures[architecture]]
        settings += [study.optimizers[optimizer], study.methods[method]]
        values: dict[str, Any] = {"name": study.name, "seed": seed}
        for layer in [*settings, last]:
            merge(values, layer)
        values.pop("seeds", None)
        needs = {key: str(values.pop(key)) for key in NEEDS if values.get(key) is not None}
        for key, name in needs.items():  # replaced by the run folder when the needed cell is trained
            source = sources.get(name)
            place = "of the same cell" if source is None else f"source {source.recipe.digest()[:12]}"
            set_path(values, NEEDS[key], f"{name} {place}")
        where = f"study {study.name}, cell {dataset}/{architecture}/{optimizer}/{method}"
        recipe = parse_recipe(values, where, allow_code=allow_code)
        found.append(Cell(dataset, architecture, optimizer, method, seed, recipe, needs))
    named = {name for cell in found for name in cell.needs.values()}
    grid = [cell for name, cell in sources.items() if name in named]
    grid += sorted(found, key=lambda cell: bool(cell.needs))
    for cell in grid:
        cell.needed(grid)
    return grid


def _source(study: Study, name: str, last: Settings, allow_code: bool) -> Cell:
    """Return the cell of a source, a data set of its own."""
    values: dict[str, Any] = {"name": study.name}
    for layer in (study.sources[name], last):
        merge(values, layer)
    recipe = parse_recipe(values, f"study {study.name}, source {name}", allow_code=allow_code)
    row = (f"source {name}", recipe.model.name, recipe.optimizer.name, name)
    return Cell(*row, recipe.seed, recipe, is_source=True)


def _seeded(study: Study, rows: list[tuple[str, ...]], quick: bool) -> list[tuple[int, tuple[str, ...]]]:
    """Return (seed, row) for each row and each seed of its data set, sorted by seed."""
    fewer = quick and study.quick.seeds is not None
    seeds = {name: settings.get("seeds", study.seeds) for name, settings in study.datasets.items()}
    wanted = [(seed, row) for row in rows for seed in (study.seeds if fewer else seeds[row[0]])]
    return sorted(wanted, key=lambda point: point[0])


def merge(values: dict[str, Any], settings: Settings) -> None:
    """Apply settings to nested values, in place.

    Sections are merged. A path such as `optimizer.lr` is set.
    """
    for key, value in settings.items():
        if "." in key:
            set_path(values, key, value)
        elif isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = _copied(value)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
