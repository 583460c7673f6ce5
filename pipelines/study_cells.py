"""Cells of a study: checks of their ancestors, their recipes and their run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advtrain.data import Dataset
from advtrain.data.rows import RowRecord, record_rows
from advtrain.events import Progress
from advtrain.recipe import Recipe, load_stored_recipe, set_path
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import records_in, write_rows
from advtrain.runs.lineage import Ancestor, all_ancestors
from advtrain.runs.start import ResolvedWeights
from advtrain.training.start import Resolver, RunStart, pinned_as, prepare_start
from advtrain.user_paths import as_written
from pipelines.leaks import check_training
from pipelines.start import announced
from pipelines.workspace import first_facts
from tuning.study.grid import NEEDS, Cell
from tuning.study.results import Result


@dataclass(frozen=True)
class LeakChecks:
    """Leak checks of the cells of a study; an equal check is made once."""

    rows: Path
    """folder with the records of samples that the study keeps"""
    progress: Progress
    _made: set[Any] = field(default_factory=set)

    def check(
        self, dataset: Dataset, ancestors: Iterable[Ancestor], records: Mapping[str, RowRecord]
    ) -> None:
        """Compare the samples of a cell with those of its ancestors.

        Raises:
            UserError: validation or test samples are training samples of an ancestor.
        """
        found = tuple(ancestors)
        if not found:
            return
        known = {**records_in(self.rows), **records}
        recorded = frozenset(a.data_digest for a in all_ancestors(found) if a.data_digest in known)
        if (made := (dataset.digest, found, recorded)) not in self._made:
            check_training(dataset, found, known, None, self.progress)
            self._made.add(made)


def check_starts(
    grid: list[Cell], datasets: Mapping[str, Dataset], resolve: Resolver, checks: LeakChecks
) -> None:
    """Check what is known of the ancestors of each cell before the first training.

    Args:
        grid: all cells.
        datasets: their data sets by name.
        resolve: returns the weights that a reference names.
        checks: checks of the study.

    Raises:
        UserError: weights cannot be read or do not fit a cell, or there is a leak.
    """
    starts: dict[tuple[str, str, str], RunStart] = {}
    samples: dict[str, RowRecord] = {}

    def start_of(cell: Cell) -> RunStart:
        recipe = _without_needed(cell)
        key = (cell.dataset, recipe.model.model_dump_json(), recipe.objective.model_dump_json())
        if key not in starts:
            start = prepare_start(recipe, datasets[cell.dataset], resolve)
            starts[key] = announced(start, checks.progress)
        return starts[key]

    for cell in grid:
        start, dataset = start_of(cell), datasets[cell.dataset]
        ancestors, records = list(start.ancestors), dict(start.records)
        for other in cell.needed(grid).values():
            source, older = datasets[other.dataset], start_of(other)
            records |= older.records
            if source.digest == dataset.digest:
                ancestors += older.ancestors
                continue
            if source.digest not in samples:
                samples[source.digest] = record_rows(source)
            records[source.digest] = samples[source.digest]
            title = f"{other.method} on {source.title}"
            ancestors.append(Ancestor("start", title, "", None, source.digest, older.ancestors))
        checks.check(dataset, ancestors, records)


def _without_needed(cell: Cell) -> Recipe:
    """Return the cell's recipe without the weights of trainings that it needs."""
    recipe = cell.recipe
    parts: dict[str, Any] = {}
    if "start" in cell.needs:
        parts["model"] = recipe.model.model_copy(update={"from_": None, "from_digest": None})
    if "teacher" in cell.needs:
        parts["objective"] = recipe.objective.model_copy(update={"teacher": None, "teacher_digest": None})
    return recipe.model_copy(update=parts)


def missing(cell: Cell, grid: list[Cell], results: Mapping[str, Result]) -> str:
    """Return which training that `cell` needs has failed; "" if none."""
    needed = cell.needed(grid)
    failed = [key for key in cell.needs if results[needed[NEEDS[key]].name].failure]
    return f"its {failed[0]} {cell.needs[failed[0]]} failed" if failed else ""


def begin(
    cell: Cell,
    grid: list[Cell],
    dataset: Dataset,
    folder: Path,
    resolve: Resolver,
    find_run: Resolver,
    checks: LeakChecks,
) -> tuple[Recipe, RunFolder]:
    """Return the complete recipe and the run folder of a cell; create the folder on first use.

    Args:
        cell: cell, whose needed trainings are finished.
        grid: all cells.
        dataset: its data.
        folder: folder of the study.
        resolve: returns the weights that a reference of the study names.
        find_run: returns the weights of a finished cell by its run folder.
        checks: leak checks of the study.

    Raises:
        UserError: weights do not fit the cell, there is a leak, or its folder is damaged.
    """
    values = cell.recipe.values()
    places = {path: as_written(folder / "cells" / n.name) for path, n in cell.needed(grid).items()}
    for path, place in places.items():
        set_path(values, path, place)

    def find(reference: str) -> ResolvedWeights:
        return find_run(reference) if reference in places.values() else resolve(reference)

    recipe = Recipe.model_validate(values) if places else cell.recipe
    run = run_folder(folder / "cells" / cell.name, recipe, dataset, find, checks)
    return pinned(recipe, run), run


def run_folder(
    path: Path, recipe: Recipe, dataset: Dataset, resolve: Resolver, checks: LeakChecks
) -> RunFolder:
    """Return the run folder of a cell; create it on first use, after a check for leaks."""
    run = RunFolder(path)
    if not (path / "run.json").is_file():
        start = prepare_start(recipe, dataset, resolve)
        path.mkdir(parents=True, exist_ok=True)
        write_rows(checks.rows, dataset)
        checks.check(dataset, start.ancestors, start.records)
        run.begin(start.recipe.to_yaml(), first_facts(recipe, dataset), start.write)
    return run


def pinned(recipe: Recipe, run: RunFolder) -> Recipe:
    """Return the cell's recipe with the digests of its start weights and its teacher.

    The name of its folder has the digest of the cell, so they are those in its stored recipe, wherever a moved study
    has the runs of other cells now.
    """
    stored = load_stored_recipe(run.path / "recipe.yaml", allow_code=True)
    model, objective = stored.model.from_, stored.objective.teacher
    parts = {
        "model": recipe.model.model_copy(update={"from_": model}),
        "objective": recipe.objective.model_copy(update={"teacher": objective}),
    }
    return pinned_as(recipe.model_copy(update=parts), stored)
