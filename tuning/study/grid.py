"""A study: data sets x architectures x optimizers x methods x seeds -> one recipe for each cell, all checked."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from advtrain.errors import UserError, nearest
from advtrain.recipe import Recipe, parse_recipe, set_path
from advtrain.schema import Config, read_yaml

Axis = Literal["dataset", "architecture", "optimizer", "method"]
AXES: tuple[Axis, ...] = ("dataset", "architecture", "optimizer", "method")

#: Settings of a recipe: sections, or paths such as `optimizer.lr`.
Settings = dict[str, Any]


class QuickConfig(Config):
    """What `--quick` leaves of a study."""

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
    """settings on top of the others"""


class Study(Config):
    """One grid over recipes, and what its rows are compared with."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")
    """of the study, its folder and its MLflow experiment"""
    description: str = ""
    """one line"""
    base: Settings = Field(default_factory=dict)
    """settings of every cell"""
    datasets: dict[str, Settings] = Field(min_length=1)
    """name -> settings; one table each. `seeds: [0]` among them stands for the study's"""
    architectures: dict[str, Settings] = Field(min_length=1)
    """name -> settings"""
    optimizers: dict[str, Settings] = Field(min_length=1)
    """name -> settings"""
    methods: dict[str, Settings] = Field(min_length=1)
    """name -> settings; `teacher: METHOD` gives objective.hat_teacher that method's run of the same cell"""
    seeds: list[int] = Field(min_length=1)
    """each cell is trained with each of them"""
    baseline: dict[Axis, str]
    """entry of an axis that the others on it are compared with, for example {method: madry}"""
    gap_samples: int = Field(default=1000, ge=1)
    """training samples attacked to measure the generalisation gap"""
    quick: QuickConfig = QuickConfig()
    """what --quick leaves"""

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
        for name, settings in self.methods.items():
            if "teacher" in settings and settings["teacher"] not in self.methods:
                teacher = str(settings["teacher"])
                raise ValueError(
                    f"methods.{name}.teacher '{teacher}' is no method{nearest(teacher, self.methods)}"
                )
        return self

    def entries(self, axis: str) -> dict[str, Settings]:
        """Return the entries of an axis."""
        found: dict[str, Settings] = getattr(self, f"{axis}s")
        return found

    def quickly(self) -> Study:
        """Return the quick form, under its own name."""
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
    """One training: a point of the grid, its recipe, and the cell whose run must be there before."""

    dataset: str
    architecture: str
    optimizer: str
    method: str
    seed: int
    recipe: Recipe
    teacher: str | None = None  # method

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The cell without its seed: a row of the report."""
        return (self.dataset, self.architecture, self.optimizer, self.method)

    @property
    def name(self) -> str:
        """Name of its folder: the same recipe has the same one."""
        row = re.sub(r"[^\w.-]+", "_", "-".join(self.row))
        return f"{row}-s{self.seed}-{self.recipe.digest()[:6]}"


def load_study(path: Path, *, quick: bool) -> Study:
    """Read a study.

    Raises:
        UserError: no such file, no YAML, or a key, type or name that is not allowed.
    """
    try:
        study = Study.model_validate(read_yaml(path, "study"))
    except ValidationError as error:
        lines = [
            ".".join(map(str, e["loc"])) + ": " + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        ]
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from error
    return study.quickly() if quick else study


def cells(study: Study, *, quick: bool, allow_code: bool) -> list[Cell]:
    """Return every cell, each with a valid recipe; teachers stand before those whom they teach.

    Raises:
        UserError: some cell's settings give no valid recipe; the message names the cell.
    """
    found = []
    rows = list(itertools.product(*(study.entries(axis) for axis in AXES)))
    for seed, (dataset, architecture, optimizer, method) in _seeded(study, rows, quick):
        settings = [study.base, study.datasets[dataset], study.architectures[architecture]]
        settings += [study.optimizers[optimizer], study.methods[method]]
        values: dict[str, Any] = {"name": study.name, "seed": seed}
        for layer in [*settings, study.quick.base if quick else {}]:
            merge(values, layer)
        values.pop("seeds", None)
        teacher = values.pop("teacher", None)
        if teacher is not None:  # the run's folder is filled in when the run is there
            set_path(values, "objective.hat_teacher", f"{teacher} of the same cell")
        where = f"study {study.name}, cell {dataset}/{architecture}/{optimizer}/{method}"
        recipe = parse_recipe(values, where, allow_code=allow_code)
        found.append(Cell(dataset, architecture, optimizer, method, seed, recipe, teacher))
    return sorted(found, key=lambda cell: cell.teacher is not None)


def _seeded(study: Study, rows: list[tuple[str, ...]], quick: bool) -> list[tuple[int, tuple[str, ...]]]:
    """Return every row with each of its data set's seeds, the first seeds of all rows first."""
    fewer = quick and study.quick.seeds is not None
    seeds = {name: settings.get("seeds", study.seeds) for name, settings in study.datasets.items()}
    wanted = [(seed, row) for row in rows for seed in (study.seeds if fewer else seeds[row[0]])]
    return sorted(wanted, key=lambda point: point[0])


def merge(values: dict[str, Any], settings: Settings) -> None:
    """Put settings on top of nested values: sections are merged, a path such as `optimizer.lr` is set."""
    for key, value in settings.items():
        if "." in key:
            set_path(values, key, value)
        elif isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = _copied(value)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
