"""Start weights in jobs: named before anything is created, resolved once, and kept."""

from __future__ import annotations

import shutil

import pytest
import torch

from advtrain.errors import UserError
from advtrain.events import ignore
from advtrain.models.start import weights_digest
from advtrain.recipe import load_stored_recipe
from advtrain.runs.leaks import Lineage
from advtrain.runs.lineage import Ancestor
from advtrain.runs.start import ResolvedWeights, read_start
from advtrain.runs.teacher import read_teacher
from pipelines import train as job
from pipelines import tune
from pipelines.start import kept_weights
from pipelines.study_cells import LeakChecks, pinned, run_folder
from pipelines.workspace import Workspace
from tests.kit import digits_data, digits_recipe
from tests.text_kit import text_recipe
from tests.unit.registry.test_weights import NET, stored_run
from tests.unit.tuning.surface import CAMPAIGN, plan_of
from tuning.campaign import make_plan, parse_campaign
from tuning.trials import Ledger


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    """Return a workspace without a tracking store; runs are created and not trained."""
    monkeypatch.chdir(tmp_path)
    for module in (job, tune):
        monkeypatch.setattr(module, "check_store", lambda *args: None)
    monkeypatch.setattr(job, "_start_tracking", lambda *args: None)
    monkeypatch.setattr(job, "_drive", lambda run, *args: run)
    return Workspace(tmp_path / "runs", "", tmp_path)


@pytest.fixture
def sources(workspace):
    """Return two runs with their models."""
    return [stored_run(workspace.runs, "seed=1"), stored_run(workspace.runs, "seed=2")]


def start_of(run) -> dict[str, torch.Tensor]:
    return dict(read_start(run.path, load_stored_recipe(run.path / "recipe.yaml").model).weights)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_train_names_a_missing_reference_before_it_creates_a_run(workspace):
    with pytest.raises(UserError, match="model.from 'nothing': no run 'nothing'"):
        job.train(digits_recipe(NET, "model.from=nothing"), workspace)
    assert not workspace.runs.exists()


def test_train_keeps_start_weights_and_resumes_by_key(workspace, sources):
    """The same command resumes its run although the source is gone; another reference is refused."""
    (source, model), (other, _) = sources
    recipe, messages = digits_recipe(NET, f"model.from={source.name}"), []
    run = job.train(recipe, workspace, once="key", progress=messages.append)
    assert f"start weights: {source.name}, 8 tensors loaded" in [
        str(m.text) for m in messages if hasattr(m, "text")
    ]
    assert equal(start_of(run), model.state_dict())
    shutil.rmtree(source.path)
    run.update(trained=True)
    assert job.train(recipe, workspace, once="key").name == run.name
    with pytest.raises(UserError, match="started with another recipe"):
        job.train(digits_recipe(NET, f"model.from={other.name}"), workspace, once="key")


def test_campaign_searches_start_weights(workspace, sources):
    """Each trial starts from its choice, also when the campaign is resumed without the sources."""
    names = [run.name for run, _ in sources]
    space = {
        "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "model.from": {"choice": [*names, None]}}
    }
    nothing = {"space": space["space"] | {"model.from": {"choice": [*names, "none"]}}}
    with pytest.raises(UserError, match=r"space: model.from=none: model.from 'none': no run"):
        tune._begin(plan_of(nothing, NET), workspace, {}, ignore)
    assert not list(workspace.runs.glob("surface*"))
    ledger, dataset = tune._begin(plan_of(space, NET), workspace, {"spent": {}}, ignore)
    for run, _ in sources:
        shutil.rmtree(run.path)
    ledger = Ledger.find(workspace.runs, ledger.name, {})
    for name, (source, model) in zip(names, sources, strict=True):
        trial = ledger.begin({"optimizer.lr": 0.01, "model.from": name}, {}, dataset=dataset)
        again = ledger.begin(trial.point, {}, of=trial, seed=7, dataset=dataset)
        for run in (trial.run, again.run):
            recipe = load_stored_recipe(run.path / "recipe.yaml")
            assert (recipe.model.from_, recipe.model.from_digest) == (
                name,
                weights_digest(model.state_dict()),
            )
            assert equal(start_of(run), model.state_dict())
            assert [ancestor.run for ancestor in Lineage.of_run(run).ancestors] == [source.name]
    scratch = ledger.begin({"optimizer.lr": 0.01, "model.from": None}, {}, dataset=dataset)
    assert start_of(scratch.run) == {}
    assert Lineage.of_run(scratch.run).ancestors == ()


def test_runs_trials_and_cells_of_texts_hold_the_tokenizer(workspace, tmp_path):
    recipe = text_recipe(tmp_path)
    run = job.train(recipe, workspace)
    plan = make_plan(parse_campaign(CAMPAIGN, "here"), recipe, "here", allow_code=False)
    ledger, dataset = tune._begin(plan, workspace, {}, ignore)
    trial = ledger.begin({"optimizer.lr": 0.01}, {}, dataset=dataset)
    again = ledger.begin(trial.point, {}, of=trial, seed=7, dataset=dataset)
    checks = LeakChecks(tmp_path / "rows", ignore)
    cell = run_folder(tmp_path / "cell", recipe, dataset, workspace.weights, checks)
    for each in (run, trial.run, again.run, cell):
        assert (each.path / "tokenizer.json").read_text() == dataset.text.tokenizer
    images = tune._begin(plan_of({}), workspace, {}, ignore)[0].begin({"optimizer.lr": 0.01}, {})
    assert not (images.run.path / "tokenizer.json").exists()


def test_campaign_refuses_combinations_that_do_not_fit(workspace, sources):
    space = {
        "model.from": {"choice": [run.name for run, _ in sources]},
        "model.args.width": {"integer": [4, 5]},
    }
    with pytest.raises(
        UserError, match=r"space: model.from=.*, model.args.width=5: .* does not fit the model"
    ):
        tune._begin(plan_of({"space": space}, NET), workspace, {}, ignore)


@pytest.mark.parametrize(
    ("space", "overrides"),
    [
        ({"model.freeze": ["backbone", ["0.0"]], "model.unfreeze_epoch": [1, None]}, ()),
        ({"model.freeze": ["backbone", ["0.0"]], "optimizer.lr": [0.1, 0.2]}, ("model.freeze=[none]",)),
        ({"training.epochs": [4, 5], "model.unfreeze_epoch": [3, 2]}, ("model.freeze=backbone",)),
        ({"model.from": ["ONE", "TWO"], "model.load": ["all", "backbone"]}, ()),
        ({"objective.teacher": ["ONE", "TWO"], "objective.distill_adv": [0.5, 2.0]}, ()),
    ],
)
def test_campaign_checks_only_points_of_its_space(workspace, sources, space, overrides):
    """A path may depend on others of the space, and the base alone need not be fit for training."""
    names = {mark: run.name for mark, (run, _) in zip(("ONE", "TWO"), sources, strict=True)}
    choices = {
        path: {"choice": [names.get(value, value) if isinstance(value, str) else value for value in values]}
        for path, values in space.items()
    }
    ledger, _ = tune._begin(plan_of({"space": choices}, NET, *overrides), workspace, {}, ignore)
    assert ledger.plan.space.keys() == space.keys()


def test_campaign_refuses_a_combination_whose_model_fails(workspace):
    space = {
        "model.args.width": {"integer": [4, 5]},
        "model.freeze": {"choice": ["backbone", ["none"]]},
        "optimizer.lr": {"choice": [0.1, 0.2]},
    }
    with pytest.raises(
        UserError, match=r"space: model.args.width=4, model.freeze=\['none'\]: .*unknown block"
    ):
        tune._begin(plan_of({"space": space}, NET), workspace, {}, ignore)


def test_cells_of_a_study_keep_their_start_weights(workspace, sources, tmp_path):
    (source, model), _ = sources
    recipe, folder = digits_recipe(NET, f"model.from={source.name}"), tmp_path / "study"
    checks = LeakChecks(folder / "rows", ignore)
    for cell in ("one", "two"):
        resolve = kept_weights(folder, workspace.weights, save=True)
        run = run_folder(folder / "cells" / cell, recipe, digits_data(), resolve, checks)
        complete = pinned(recipe, run)
        assert complete == load_stored_recipe(run.path / "recipe.yaml")
        assert equal(dict(read_start(run.path, complete.model).weights), model.state_dict())
        shutil.rmtree(source.path, ignore_errors=True)


@pytest.mark.parametrize(
    ("resolved", "shown"),
    [("models:/m/3", "models:/m/3"), ("models:/m@champion", "the weights ffffffffffff")],
)
def test_kept_weights_are_announced_once(tmp_path, resolved, shown):
    """The alias may have moved since they were kept."""
    alias, said = "models:/m@champion", []

    def first(reference):
        return ResolvedWeights({"w": torch.zeros(1)}, Ancestor("start", resolved, "f" * 64))

    def other(reference):
        raise AssertionError("resolved again")

    kept_weights(tmp_path, first, save=True, progress=said.append)(alias)
    assert said == []
    resolve = kept_weights(tmp_path, other, save=False, progress=said.append)
    assert resolve(alias) is resolve(alias)
    (event,) = said
    assert event.text == f"{alias}: {shown}, as resolved before and kept in '{tmp_path / 'start'}'"


def test_campaign_keeps_its_teacher(workspace, sources):
    """Each trial has a copy of the teacher, also when the campaign is resumed without the source."""
    (source, model), _ = sources
    objective = f"objective={{adv_ce: 1, distill_adv: 1, teacher: {source.name}}}"
    space = {"space": {"objective.distill_adv": {"uniform": [0.1, 1]}}}
    missing = objective.replace(source.name, "nothing")
    with pytest.raises(UserError, match="objective.teacher 'nothing': no run 'nothing'"):
        tune._begin(plan_of(space, NET, missing), workspace, {}, ignore)
    ledger, dataset = tune._begin(plan_of(space, NET, objective), workspace, {"spent": {}}, ignore)
    shutil.rmtree(source.path)
    ledger = Ledger.find(workspace.runs, ledger.name, {})
    run = ledger.begin({"objective.distill_adv": 0.5}, {}, dataset=dataset).run
    recipe = load_stored_recipe(run.path / "recipe.yaml")
    assert recipe.objective.teacher_digest == weights_digest(model.state_dict())
    assert equal(read_teacher(run.path, recipe).state_dict(), model.state_dict())
    assert [ancestor.role for ancestor in Lineage.of_run(run).ancestors] == ["teacher"]


def test_cell_of_a_study_has_a_copy_of_its_teacher(workspace, sources, tmp_path):
    (source, model), _ = sources
    recipe = digits_recipe(NET, f"objective={{clean_ce: 1, hat: 0.5, teacher: {source.name}}}")
    checks = LeakChecks(tmp_path / "study" / "rows", ignore)
    path = tmp_path / "study" / "cells" / "one"
    run = run_folder(path, recipe, digits_data(), workspace.weights, checks)
    complete = pinned(recipe, run)
    assert complete == load_stored_recipe(run.path / "recipe.yaml")
    shutil.rmtree(source.path)
    assert equal(read_teacher(run.path, complete).state_dict(), model.state_dict())


def test_train_under_a_key_resumes_a_run_with_a_teacher(workspace, sources):
    (source, _), (other, _) = sources
    texts = [f"objective={{distill_adv: 1, teacher: {run.name}}}" for run in (source, other)]
    run = job.train(digits_recipe(NET, texts[0]), workspace, once="key")
    shutil.rmtree(source.path)
    run.update(trained=True)
    assert job.train(digits_recipe(NET, texts[0]), workspace, once="key").name == run.name
    with pytest.raises(UserError, match="started with another recipe"):
        job.train(digits_recipe(NET, texts[1]), workspace, once="key")
