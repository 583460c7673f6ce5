"""A resumed run takes only settings that do not affect its result."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from advtrain.api import load
from advtrain.api.load import load_model
from advtrain.data import load_data
from advtrain.data.unseen import Accepts
from advtrain.errors import UserError
from advtrain.events import ignore
from advtrain.recipe import load_stored_recipe
from advtrain.runs.folder import RunFolder
from pipelines import model_ref, promote, tune
from pipelines import train as job
from pipelines.model_ref import ExternalModelSpec, find_model, other_data
from pipelines.train import resume
from pipelines.workspace import Workspace, data_at
from tests.kit import digits_recipe
from tests.unit.tuning.surface import ledger_of, plan_of, show
from tuning.trials import Ledger


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "training.epochs=20",
            "--set training.epochs: a resumed run or campaign keeps its recipe, except for training.num_work",
        ),
        ("optimizer.lr=1", "to change optimizer.lr, name a recipe and start a new run"),
        ("training.timeout_s=9", "no run 'nothing'"),
        ("data.path=x", "no run 'nothing'"),
        ("data.source=csv", "to change data.source, name a recipe"),
        ("data.path=2026", r"""takes a path \(got 2026\); write data.path="'2026'\""""),
    ],
)
def test_resume_takes_placement_settings_only(setting, message, tmp_path):
    with pytest.raises(UserError, match=message):
        resume("nothing", Workspace(tmp_path, "", tmp_path), overrides=[setting])


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Return a run whose data has moved to new.npz, its workspace, and what later steps get."""
    images = np.random.default_rng(0).integers(0, 256, (90, 4, 4), np.uint8)
    for name, x in (("new", images), ("changed", 255 - images)):
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(90) % 3)
    recipe = digits_recipe("data={source: npz, path: old.npz}", "model.args={}")
    data = recipe.data.model_copy(update={"path": "new.npz"})
    facts = {"status": "stopped", "trained": False, "data_digest": load_data(data, tmp_path).digest}
    run = RunFolder.create(tmp_path / "runs", recipe.name, recipe.digest(), recipe.to_yaml(), facts)
    monkeypatch.setattr(job, "_start_tracking", lambda *args: None)
    monkeypatch.setattr(job, "_drive", lambda run, recipe, dataset, *args: (recipe, dataset))
    return run, Workspace(tmp_path / "runs", "", tmp_path), recipe


def test_resume_takes_data_that_moved_and_remembers_its_path(moved):
    run, workspace, recipe = moved
    with pytest.raises(UserError, match=r"old\.npz' does not exist; set data\.path"):
        resume(run.name, workspace)
    found, dataset = resume(run.name, workspace, overrides=["data.path=new.npz", "training.timeout_s=9"])
    assert (dataset.digest, found.digest()) == (run.facts()["data_digest"], recipe.digest())
    assert found.training.timeout_s == 9
    assert load_stored_recipe(run.path / "recipe.yaml") == recipe
    assert resume(run.name, workspace)[1].digest == dataset.digest
    assert resume(run.name, workspace, expected=recipe)[1].digest == dataset.digest
    with pytest.raises(UserError, match="no intact checkpoint|no checkpoint"):
        find_model(run.name, workspace, ExternalModelSpec(), data=None, threat=None)


def test_resume_takes_the_path_of_the_named_recipe(moved):
    run, workspace, recipe = moved
    at_new = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "new.npz"})})
    assert resume(run.name, workspace, expected=at_new)[0].digest() == recipe.digest()
    with pytest.raises(UserError, match="started with another recipe"):
        resume(run.name, workspace, expected=at_new.model_copy(update={"seed": 1}))


def test_resume_refuses_a_path_with_other_data(moved):
    run, workspace, _ = moved
    with pytest.raises(UserError, match="the data has changed since training"):
        resume(run.name, workspace, overrides=["data.path=changed.npz"])
    assert "data_path" not in run.facts()


@pytest.mark.parametrize("trained", [True, False])
def test_resume_checks_the_machine_only_if_training_is_left(moved, monkeypatch, trained):
    run, workspace, _ = moved
    checked = []
    monkeypatch.setattr(job, "check_machine", lambda *args: checked.append(args))
    run.update(trained=trained, data_path="new.npz")
    resume(run.name, workspace, num_workers=2)
    assert len(checked) == (not trained)


def test_campaign_trains_until_the_budget_is_spent_and_confirmed(tmp_path):
    ledger = ledger_of(tmp_path, {"budget": {"trials": 2, "wall": "1h"}, "confirm": {"top": 1, "seeds": 1}})
    assert tune._searches(ledger)
    for number in range(2):
        trial = ledger.begin({"optimizer.lr": 1e-2, "adversary.eps": 0.1}, {})
        assert tune._searches(ledger)
        show(trial, (0.5 + number / 10, 0.9))
        ledger.close(trial, "finished")
        ledger.update(spent={"wall": 1800.0 * (number + 1)})
        assert tune._searches(ledger) == (number == 0)
    assert tune._confirms(ledger)
    confirmation = ledger.begin(trial.point, {}, of=trial, seed=ledger.plan.base.seed + 1)
    assert tune._confirms(ledger)
    ledger.close(confirmation, "finished")
    assert not tune._confirms(ledger)


def test_campaign_without_open_trials_needs_no_ray(tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.runner.start_ray", lambda address: pytest.fail("Ray was started"))
    ledger = ledger_of(tmp_path, {"budget": {"trials": 40, "wall": "1h"}})
    ledger.update(spent={"wall": 3600.0})
    tune.search(ledger, None, SimpleNamespace(progress=ignore), None)


def test_campaign_under_a_key_takes_a_new_path_but_no_other_plan(moved, monkeypatch):
    _, workspace, _ = moved
    plans = [
        plan_of(changes, "data={source: npz}", f"data.path={path}.npz", "model.args={}")
        for changes, path in [({}, "old"), ({}, "new"), ({"register": {"top": 2}}, "new"), ({}, "changed")]
    ]
    digest = load_data(plans[1].base.data, workspace.data_root).digest
    facts = {"status": "stopped", "environment": {}, "data_digest": digest, "once": "key"}
    ledger = Ledger.create(workspace.runs, plans[0], facts)
    monkeypatch.setattr(tune, "_parent", lambda *args: None)
    monkeypatch.setattr(tune, "_drive", lambda ledger, dataset, *args: dataset)
    with pytest.raises(UserError, match="started with other settings"):
        tune.tune(plans[2], workspace, once="key")
    with pytest.raises(UserError, match="the data has changed since training"):
        tune.tune(plans[3], workspace, once="key")
    assert tune.tune(plans[1], workspace, once="key").digest == digest
    assert ledger.facts()["data_path"] == "new.npz"
    assert tune.tune(plans[0], workspace, once="key").digest == digest
    extended = plan_of({"budget": {"trials": 9}}, "data={source: npz}", "data.path=new.npz", "model.args={}")
    assert (
        tune.tune(extended, workspace, once="key").digest == digest
    )  # the budget of either may be the larger one


def test_resume_refuses_a_path_for_a_recipe_without_one(tmp_path):
    recipe, workspace = digits_recipe(), Workspace(tmp_path, "", tmp_path)
    facts = {"status": "finished", "trained": True, "data_digest": "0"}
    run = RunFolder.create(tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), facts)
    campaign = ledger_of(tmp_path)
    for again, name in (resume, run.name), (partial(tune.resume, changes={}), campaign.name):
        with pytest.raises(UserError, match=r"has no data\.path \(data\.source: digits\)"):
            again(name, workspace, overrides=["data.path=x"])
    assert "data_path" not in run.facts() | campaign.facts()


def test_campaign_takes_no_setting_but_the_path_of_the_data(tmp_path):
    workspace = Workspace(tmp_path, "", tmp_path)
    with pytest.raises(UserError, match="--set training.num_workers: a resumed run or campaign keeps"):
        tune.resume("nothing", workspace, {}, overrides=["training.num_workers=2"])
    with pytest.raises(UserError, match="no campaign 'nothing'"):
        tune.resume("nothing", workspace, {}, overrides=["data.path=x"])


def test_evaluation_uses_the_test_split_of_data_that_moved(moved):
    """Otherwise the whole file would be evaluated, with the samples of the training."""
    run, workspace, recipe = moved
    digest = run.facts()["data_digest"]
    found = other_data("new.npz", workspace, Accepts((1, 4, 4), 3, None, None), recipe, digest)
    assert (found.digest, len(found.test)) == (digest, 18)
    other = other_data("changed.npz", workspace, Accepts((1, 4, 4), 3, None, None), recipe, digest)
    assert len(other.test) == 90


@pytest.fixture
def no_weights(monkeypatch):
    """Replace the weights of each run, which are not there."""
    for module in (model_ref, load):
        monkeypatch.setattr(
            module, "trained_model", lambda run, recipe, data: SimpleNamespace(load=lambda: data)
        )


@pytest.mark.usefixtures("no_weights")
def test_run_is_evaluated_on_its_data_at_a_new_path(moved):
    run, workspace, _ = moved
    place = partial(find_model, run.name, workspace, ExternalModelSpec(), threat=None)
    hint = (
        f"if the data has moved, record its new path with `advtrain train --resume {run.name} --set data.path"
    )
    for data in (None, "changed.npz"):
        with pytest.raises(UserError, match=f"old.npz' does not exist.*{hint}"):
            place(data=data)
    found = place(data="new.npz")
    assert (found.dataset.digest, found.source.load()) == (run.facts()["data_digest"], found.dataset)
    run.update(data_path="new.npz")
    assert place(data=None).dataset.digest == found.dataset.digest
    assert len(place(data="changed.npz").dataset.test) == 90


@pytest.mark.usefixtures("no_weights")
def test_load_model_finds_data_that_moved(moved):
    run, _, recipe = moved
    root = run.path.parents[1]
    with pytest.raises(UserError, match=r"old\.npz' does not exist.*--resume .* --set data\.path=PATH"):
        load_model(run.path, data_root=root)
    run.update(data_path="new.npz")
    assert load_model(run.path, data_root=root).digest == run.facts()["data_digest"]


def test_promotion_names_a_way_if_the_data_of_a_version_has_moved(moved, monkeypatch):
    _, workspace, recipe = moved
    monkeypatch.setattr(
        promote, "load_registered", lambda *args: (None, recipe, "digest", SimpleNamespace(text=None), None)
    )
    found = promote._repetition("m", workspace, ignore)(SimpleNamespace(version="1"), 2)
    assert "has moved, make its former path a link to it" in found.reason


@pytest.mark.parametrize(("path", "loads"), [("old.npz", 2), ("here.npz", 1)])
def test_evaluation_looks_for_moved_data_only_if_the_path_is_missing(moved, monkeypatch, path, loads):
    run, workspace, recipe = moved
    (workspace.data_root / "here.npz").write_bytes(b"")
    opened = []
    for name in ("open_data", "load_unseen"):
        monkeypatch.setattr(
            model_ref, name, lambda config, *args: opened.append(config) or SimpleNamespace(digest="")
        )
    other_data("changed.npz", workspace, Accepts((1, 4, 4), 3, None, None), data_at(recipe, path), "digest")
    assert len(opened) == loads


def test_variable_that_is_not_set_in_the_path_of_a_model_does_not_prevent_other_data(moved):
    run, workspace, recipe = moved
    own = data_at(recipe, "$NO_SUCH_VARIABLE/old.npz")
    found = other_data(
        "new.npz", workspace, Accepts((1, 4, 4), 3, None, None), own, run.facts()["data_digest"]
    )
    assert found.digest == run.facts()["data_digest"]


def test_finished_run_remembers_the_path_of_its_data(moved):
    run, workspace, _ = moved
    run.update(status="finished")
    assert resume(run.name, workspace).message.endswith("nothing to do")
    with pytest.raises(UserError, match="the data has changed since training"):
        resume(run.name, workspace, overrides=["data.path=changed.npz"])
    assert resume(run.name, workspace, overrides=["data.path=new.npz"]).status == "nothing to do"
    assert (run.facts()["data_path"], run.facts()["status"]) == ("new.npz", "finished")
