"""Cells of a study: leak checks, moved folders, and failures that leave the other cells alone."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from advtrain.data import ArraySplit, DataConfig, load_data
from advtrain.errors import UserError
from advtrain.events import ignore
from advtrain.recipe import load_stored_recipe
from advtrain.runs.leaks import write_rows
from pipelines import compare
from pipelines.start import kept_weights
from pipelines.study_cells import LeakChecks, begin, check_starts, pinned
from pipelines.workspace import Workspace
from tests.unit.registry.test_weights import stored_run
from tuning.study.grid import Study, cells
from tuning.study.results import Result

PARENT, CHILD = (load_data(DataConfig(source="digits", split_seed=seed), None) for seed in (0, 1))  # type: ignore[arg-type]
CNN = {"name": "cnn2", "args": {"width": 4}}
DIGITS = {
    "data": {"source": "digits", "split_seed": 1},
    "adversary": {"eps": 0.1, "num_steps": 3},
    "training": {"epochs": 2, "batch_size": 64},
    "evaluation": {"threat": {"eps": 0.1}},
}
SOURCE = DIGITS | {"model": CNN, "optimizer": {"name": "sgd", "lr": 0.1}, "objective": {"clean_ce": 1}}
PLAIN, TAUGHT = {"clean_ce": 1}, {"distill_adv": 1}


def grid_of(methods, **changes):
    study = {
        "name": "small",
        "base": {"model": CNN, "optimizer": {"name": "sgd", "lr": 0.1}},
        "datasets": {"digits": DIGITS},
        "architectures": {"cnn": {}},
        "optimizers": {"sgd": {}},
        "methods": methods,
        "seeds": [0],
        "baseline": {"method": next(iter(methods))},
    }
    return cells(Study.model_validate(study | changes), quick=False, allow_code=False)


def inverted(data):
    """Return other data, which has no sample of `data`."""
    parts = {
        name: ArraySplit(getattr(data, name).images.max() - getattr(data, name).images, split.labels)
        for name in ("train", "validation", "test")
        for split in [getattr(data, name)]
    }
    return replace(data, digest="d" * 64, **parts)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path / "runs", "", tmp_path)


@pytest.fixture
def known(workspace) -> str:
    """Return a run with records of its samples, some of which are test samples of the study."""
    run, _ = stored_run(workspace.runs, "seed=1")
    write_rows(run.rows, PARENT)
    return run.name


@pytest.fixture
def unknown(workspace) -> str:
    """Return a run on other data, without records."""
    run, _ = stored_run(workspace.runs, "seed=2")
    run.update(data_digest="e" * 64)
    return run.name


def check(grid, workspace, progress=ignore, resolve=None, **datasets):
    folder = workspace.runs / "study-small"
    found = {cell.dataset: datasets.get(cell.dataset.replace(" ", "_"), CHILD) for cell in grid}
    check_starts(grid, found, resolve or workspace.weights, LeakChecks(folder / "rows", progress))


def refuses(known):
    return pytest.raises(UserError, match=f"training samples of its ancestor {known}")


@pytest.mark.parametrize("first", [{}, {"start": "large"}], ids=["two teachers", "a source and a teacher"])
def test_every_teacher_is_checked_before_the_first_training(workspace, known, unknown, first):
    taught = [{"objective": TAUGHT | {"teacher": run}} | first for run in (unknown, known)]
    check(grid_of({"one": taught[0]}, sources={"large": SOURCE}), workspace)
    with refuses(known):
        check(grid_of({"one": taught[0], "two": taught[1]}, sources={"large": SOURCE}), workspace)


def test_start_weights_of_a_cell_with_a_teacher_of_the_study_are_checked(workspace, known):
    method = {"objective": TAUGHT, "teacher": "plain", "model.from": known}
    with refuses(known):
        check(grid_of({"plain": {"objective": PLAIN}, "distilled": method}), workspace)


def test_samples_of_a_source_and_of_its_ancestors_are_checked(workspace, known):
    methods = {"started": {"objective": PLAIN, "start": "large"}}
    grid = grid_of(methods, sources={"large": SOURCE})
    check(grid, workspace)
    with pytest.raises(UserError, match=r"training samples of its ancestor large on digits \(digits\)"):
        check(grid, workspace, source_large=PARENT)
    grid = grid_of(methods, sources={"large": SOURCE | {"model": CNN | {"from": known}}})
    with refuses(known):
        check(grid, workspace, source_large=inverted(CHILD))


def test_edited_study_checks_kept_weights_and_names_unknown_ones(workspace, known, unknown):
    """The sources are gone; a new cell has other data than the first."""
    folder, said = workspace.runs / "study-small", []
    keep = kept_weights(folder, workspace.weights, save=True)
    for run in (known, unknown):
        keep(run)
        shutil.rmtree(workspace.runs / run)
    resolve = kept_weights(folder, workspace.weights, save=False)
    methods = {run: {"objective": PLAIN, "model.from": run} for run in (unknown, known)}
    with refuses(known):
        check(grid_of(methods), workspace, lambda event: said.append(event.text), resolve)
    (note,) = [text for text in said if "is unknown" in text]
    assert f"the training data of {unknown} is unknown" in note


def begin_at(folder, grid, workspace, dataset=CHILD, find_run=None):
    checks = LeakChecks(folder / "rows", ignore)
    return begin(grid[-1], grid, dataset, folder, workspace.weights, find_run or workspace.weights, checks)


def test_leak_that_shows_after_the_training_of_a_source_is_refused(workspace, known):
    grid = grid_of({"started": {"objective": PLAIN, "start": "large"}}, sources={"large": SOURCE})
    folder = workspace.runs / "study-small"
    with refuses(known):
        begin_at(folder, grid, workspace, find_run=lambda reference: workspace.weights(known))
    assert not list(folder.glob("cells/*/run.json"))


def test_cell_of_a_moved_study_keeps_its_weights(workspace, unknown):
    """The run folder of its source has another absolute path now."""
    methods = {"started": {"objective": PLAIN | TAUGHT, "start": "large", "teacher": "large"}}
    grid, folder = grid_of(methods, sources={"large": SOURCE}), workspace.runs / "study-small"
    first, run = begin_at(folder, grid, workspace, PARENT, lambda _: workspace.weights(unknown))
    moved = folder.rename(workspace.runs.parent / "moved")
    again, run = begin_at(moved, grid, workspace, PARENT)
    assert run.path.is_relative_to(moved)
    assert again == pinned(first, run) == load_stored_recipe(run.path / "recipe.yaml")
    assert again.digest() == first.digest()
    assert None not in (again.model.from_digest, again.objective.teacher_digest)


def test_cell_that_cannot_begin_fails_and_the_others_are_trained(workspace, monkeypatch):
    def fails(cell, *args):
        if cell.method == "bad":
            raise UserError("model.from 'x' does not fit the model")
        return cell.recipe, SimpleNamespace(path="")

    ray = SimpleNamespace(
        put=lambda value: value,
        get=lambda reference: reference,
        remote=lambda **options: lambda task: SimpleNamespace(remote=lambda *args: object()),
        cluster_resources=dict,
        wait=lambda running, timeout: (running, []),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(compare, "start_ray", lambda address: None)
    monkeypatch.setattr(compare, "workers_take_gpus", lambda kind: False)
    monkeypatch.setattr(compare, "begin", fails)
    monkeypatch.setattr(compare, "_collect", lambda reference, cell, *args: Result(cell))
    taught = {"objective": TAUGHT, "teacher": "bad"}
    grid = grid_of({"bad": {"objective": PLAIN}, "taught": taught, "good": {"objective": {"adv_ce": 1}}})
    study = SimpleNamespace(gap_samples=1)
    said: list[str] = []
    results = compare._train_all(
        study,
        grid,
        {"digits": CHILD},
        workspace.runs,
        None,
        workspace,
        workspace.weights,
        None,
        lambda event: said.append(event.text),
    )
    assert {result.cell.method: result.failure for result in results} == {
        "bad": "model.from 'x' does not fit the model",
        "good": "",
        "taught": "its teacher bad failed",
    }
    assert any(text.endswith("seed 0: failed: model.from 'x' does not fit the model") for text in said)
