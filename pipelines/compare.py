"""Studies: train every cell of a grid on Ray, write one report to disk and to MLflow.

Each cell is a run folder and resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from advtrain.cluster import default_device, put_shared, start_ray, workers_take_gpus
from advtrain.data import Dataset, stratified
from advtrain.documents import dump_json, read_record
from advtrain.environment import tune_malloc
from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, Report, evaluate
from advtrain.events import Message, Progress, ignore
from advtrain.models.serialized import Architecture
from advtrain.recipe import Recipe, TrainingConfig, load_stored_recipe
from advtrain.runs.folder import RunFolder, write_atomically
from advtrain.runs.lineage import ancestors_in
from advtrain.runs.storage import mirror_of
from advtrain.tracking.parent_run import ParentRun
from advtrain.tracking.store import check_store
from advtrain.tracking.tracker import Tracker
from advtrain.training import Session, run_worker
from advtrain.training.contract import check_code, check_data
from advtrain.training.start import Resolver
from advtrain.training.trained_model import architecture, trained_model
from pipelines.data import announce
from pipelines.start import kept_weights
from pipelines.study_cells import LeakChecks, begin, check_starts, missing
from pipelines.workspace import Workspace, about_report, check_model, load_dataset
from tuning.study.grid import Cell, Study, cells
from tuning.study.report import StudyReport, write_report
from tuning.study.results import Result


@dataclass(frozen=True)
class StudyResult:
    """Result of a study."""

    folder: Path
    status: Literal["finished", "stopped"]
    report: StudyReport | None = None
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        """Results of the cells that could not be trained."""
        return [result for result in self.results if result.failure]


def compare(
    study: Study,
    workspace: Workspace,
    *,
    quick: bool = False,
    allow_code: bool = False,
    progress: Progress = ignore,
) -> StudyResult:
    """Train every cell that is not done yet, and write the report.

    Args:
        study: study, as returned by `tuning.study.grid.load_study`.
        workspace: locations of runs, data, tracking store and Ray.
        quick: whether to run the quick form of the study.
        allow_code: whether recipes may name user code.
        progress: called with each event.
    """
    grid = cells(study, quick=quick, allow_code=allow_code)
    folder = workspace.runs / f"study-{study.name}"
    weights = cache(workspace.weights)  # a reference is resolved once, here and when its cells begin
    resolve = kept_weights(folder, weights, save=False, progress=progress)
    names = dict.fromkeys(cell.dataset for cell in grid)  # of sources and of the study's data sets
    datasets = {name: _dataset(name, grid, workspace, progress) for name in names}
    checks = LeakChecks(folder / "rows", cache(progress))
    check_starts(grid, datasets, resolve, checks)
    check_store(workspace.tracking_uri, study.name, *(cell.recipe.name for cell in grid))
    if mirror_of(workspace.runs):
        raise UserError("--runs names an object store, but a study needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).locked():
        return _compare(study, grid, datasets, folder, workspace, weights, checks, progress)


def _compare(
    study: Study,
    grid: list[Cell],
    datasets: dict[str, Dataset],
    folder: Path,
    workspace: Workspace,
    weights: Resolver,
    checks: LeakChecks,
    progress: Progress,
) -> StudyResult:
    parent = _parent(study, folder, workspace)
    progress(Message(f"study {study.name}: {len(grid)} trainings in {folder}"))
    started = time.perf_counter()
    try:
        results = _train_all(study, grid, datasets, folder, parent, workspace, weights, checks, progress)
    except KeyboardInterrupt:
        return StudyResult(folder, "stopped")
    report = write_report(study, results, folder / "report")
    for cell in grid:  # including cells that finished while the store was unreachable
        _track(cell, datasets[cell.dataset], folder, parent, workspace)
    parent.finish({f"test_{name}": value for name, value in report.metrics.items()}, folder / "report")
    return StudyResult(folder, "finished", report, results, time.perf_counter() - started)


def _dataset(name: str, grid: list[Cell], workspace: Workspace, progress: Progress) -> Dataset:
    """Load one data set of the study, and check the cells (trainings) that use it.

    Raises:
        UserError: the cells differ in the data or evaluation section or in adversary.table, a recipe does not fit the
            data, or the data set is a regression.
    """
    recipes = [cell.recipe for cell in grid if cell.dataset == name]
    for recipe in recipes[1:]:
        if recipe.data.model_copy(update={"augment": recipes[0].data.augment}) != recipes[0].data:
            raise UserError(
                f"dataset '{name}': its cells differ in the data section; only data.augment may vary"
            )
        if recipe.evaluation != recipes[0].evaluation:
            raise UserError(
                f"dataset '{name}': its cells differ in the evaluation section; it must be the same"
            )
    dataset = load_dataset(_with_table(name, recipes), workspace, progress=progress)
    announce(dataset, progress)
    checked: list[tuple[Architecture, TrainingConfig]] = []
    for recipe in recipes:
        check_data(recipe, dataset)
        check_code(recipe)
        if (made := (architecture(recipe, dataset), recipe.training)) not in checked:
            check_model(recipe, dataset, progress, is_registered=False)
            checked.append(made)
    if dataset.regression:
        raise UserError(f"dataset '{name}' is a regression; studies compare robust accuracies of classifiers")
    return dataset


def _with_table(name: str, recipes: list[Recipe]) -> Recipe:
    """Return the recipe whose data and tables are loaded: the first that trains on edited words, or the first.

    Raises:
        UserError: the recipes name several tables of substitutions.
    """
    tables = {recipe.adversary.table: recipe for recipe in recipes if recipe.adversary.table is not None}
    if len(tables) > 1:
        raise UserError(
            f"dataset '{name}': its cells differ in adversary.table ({', '.join(map(str, tables))}); name one table"
        )
    return next(iter(tables.values()), recipes[0])


def _parent(study: Study, folder: Path, workspace: Workspace) -> ParentRun:
    """Return the study's MLflow run, the parent of the cells' runs.

    It is created once for each folder and tracking store.
    """
    file = folder / "study.json"
    if file.exists():
        try:
            facts = read_record(file, "uri", "run_id")
        except (OSError, ValueError) as error:
            raise UserError(f"'{file}' is unreadable: {error}") from error
        if facts["uri"] == workspace.tracking_uri:
            return ParentRun(facts["uri"], facts["run_id"], facts.get("experiment_id", ""))
    parent = ParentRun.start(workspace.tracking_uri, study.name, study.name, {"advtrain.study": study.name})
    write_atomically(file, json.dumps(vars(parent)))
    return parent


def _train_all(
    study: Study,
    grid: list[Cell],
    datasets: dict[str, Dataset],
    folder: Path,
    parent: ParentRun,
    workspace: Workspace,
    weights: Resolver,
    checks: LeakChecks,
    progress: Progress,
) -> list[Result]:
    """Run unfinished cells as Ray tasks, one core or GPU each; Ray reuses its workers."""
    results = {cell.name: result for cell in grid if (result := _done(cell, folder)) is not None}
    resolve = kept_weights(folder, weights, save=True)
    waiting = [cell for cell in grid if cell.name not in results]
    if results:
        progress(Message(f"{len(results)} of them are already done"))
    if waiting:
        start_ray(workspace.address)
        import ray

        gpus = int(workers_take_gpus("auto"))
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(run_cell)
        shared = {name: put_shared(dataset) for name, dataset in datasets.items()}
        running: dict[Any, Cell] = {}
        while waiting or running:
            # Queue at most two tasks more than can run: keeps the grid's order, and allows for new nodes.
            room = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)) + 2 - len(running)
            ready_cells = [c for c in waiting if all(n.name in results for n in c.needed(grid).values())]
            for cell in ready_cells[: max(0, room)]:
                waiting.remove(cell)
                try:
                    if failure := missing(cell, grid, results):
                        raise UserError(failure)
                    dataset = datasets[cell.dataset]
                    recipe, run = begin(cell, grid, dataset, folder, resolve, workspace.weights, checks)
                except UserError as error:  # the other cells are trained
                    results[cell.name] = Result(cell, failure=str(error))
                    progress(Message(f"{len(results):3} of {len(grid)}  {results[cell.name]}: {error}"))
                    continue
                work = (recipe.values(), shared[cell.dataset], str(run.path), study.gap_samples)
                running[task.remote(*work)] = cell
            if not running:
                continue
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                cell = running.pop(reference)
                result = _collect(
                    reference, cell, datasets[cell.dataset], folder, parent, workspace, progress
                )
                results[cell.name] = result
                progress(Message(f"{len(results):3} of {len(grid)}  {result}"))
    return [results[cell.name] for cell in grid]


def _done(cell: Cell, folder: Path) -> Result | None:
    """Return a finished cell's result; return None if it must still be trained."""
    path = folder / "cells" / cell.name
    return Result.load(cell, path) if (path / "result.json").exists() else None


def run_cell(values: dict[str, Any], dataset: Dataset, folder: str, gap_samples: int) -> str:
    """Train one cell, evaluate it on test and training samples; return "" or an error.

    Training resumes from the last checkpoint. The function runs in a Ray worker, on one core or one GPU.
    """
    import torch

    torch.set_num_threads(1)
    tune_malloc()
    recipe, run = Recipe.model_validate(values), RunFolder(Path(folder))
    judge = recipe.evaluation
    with run.locked(wait_s=60):  # the worker of a killed driver exits with a delay
        outcome = run_worker(recipe, dataset, run, Session(device=default_device()))
        if outcome.status != "finished":
            return outcome.message
        model = trained_model(run, recipe, dataset).load()
        reports = []
        splits = {"test": dataset.test, "train": stratified(dataset.train, gap_samples, judge.seed)}
        for name, split in splits.items():
            started = time.monotonic()
            found = evaluate(
                EvalSpec(
                    model,
                    split,
                    dataset,
                    judge.judged_with,
                    judge.threat_model,
                    name=run.name,
                    split_name=name,
                    seed=judge.seed,
                    batch_size=judge.batch_size,
                ),
            )
            assert isinstance(found.report, Report)
            if name == "test":
                about = about_report(recipe, time.monotonic() - started, run.training_seconds())
                found.save(run.report, about, ancestors_in(run.facts()))
            reports.append(found.report)
        figures = {"train_robust_accuracy": reports[1].robust_accuracy}
        write_atomically(run.path / "result.json", dump_json(figures))  # last: it marks the cell as done
    return ""


def _collect(
    reference: Any,
    cell: Cell,
    dataset: Dataset,
    folder: Path,
    parent: ParentRun,
    workspace: Workspace,
    progress: Progress,
) -> Result:
    """Return one finished task's result and track its run; record a failure, do not raise it."""
    import ray

    run = RunFolder(folder / "cells" / cell.name)
    try:
        failure = str(ray.get(reference))
    except ray.exceptions.RayError as error:
        failure = str(error).strip().split("\n")[-1][:500]
    run.update(status="failed" if failure else "finished", message=failure)
    try:
        _track(cell, dataset, folder, parent, workspace)
    except UserError as error:  # the store is unreachable; the cell is tracked at the end of the study
        progress(Message(f"not tracked yet: {error}", "note"))
    return Result(cell, failure=failure) if failure else Result.load(cell, run.path)


def _track(cell: Cell, dataset: Dataset, folder: Path, parent: ParentRun, workspace: Workspace) -> None:
    """Sync the cell's MLflow run, a child of the study's run, with its run folder.

    Raises:
        UserError: the tracking store is unreachable.
    """
    run = RunFolder(folder / "cells" / cell.name)
    if not (run.path / "run.json").exists():  # a training that it needs failed
        return
    if (run.path / "tracking.json").exists():
        tracker = Tracker.reopen(run, workspace.tracking_uri)
    else:
        recipe = load_stored_recipe(run.path / "recipe.yaml", allow_code=True)
        tracker = Tracker.start(run, recipe, dataset, workspace.tracking_uri, parent=parent.run_id)
    if not tracker.sync():
        raise UserError(f"MLflow at {workspace.tracking_uri} is unreachable")
