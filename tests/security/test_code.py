"""No command runs a user's code without --allow-code, whatever a recipe, a run or the working folder says."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from advtrain.errors import UserError
from advtrain.promotion import load_policy
from advtrain.recipe import load_recipe
from advtrain.registry import load_registered
from pipelines.cli.options import POLICIES
from pipelines.model_ref import ExternalModelSpec, find_model
from pipelines.promote import PromotionRequest, promote
from pipelines.workspace import Workspace
from tests.kit import RECIPES, advtrain, digits_recipe
from tests.registry_kit import flags, make_archive, make_evaluation, make_version
from tests.security.test_loaders import refused

#: Modules that commands import: from the standard library, and from installed packages.
SHADOWS = ("queue", "statistics", "ray", "mlflow", "sklearn", "pyarrow", "advtrain", "sitecustomize")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Return a file that appears once the code of `evil.py` in the working folder runs."""
    touched = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(f"open({str(touched)!r}, 'w').close()\nthing = dict\n")
    return touched


def with_evil(text: str) -> str:
    """Return the recipe with user code as model, attack and term."""
    recipe = yaml.safe_load(text)
    recipe["model"] = {"name": "evil:thing"}
    recipe["adversary"] = {"name": "evil:thing", "eps": 0.1}
    recipe["objective"] = {"adv_ce": 1.0, "custom": {"function": "evil:thing", "weight": 0.1}}
    return json.dumps(recipe)


def test_checking_names_imports_nothing(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(with_evil(digits_recipe().to_yaml()))
    assert load_recipe(tmp_path / "r.yaml", allow_code=True).model.name == "evil:thing"
    assert "evil" not in sys.modules
    with pytest.raises(UserError, match="--allow-code"):
        load_recipe(tmp_path / "r.yaml")
    assert not evil.exists()


@pytest.mark.parametrize("command", ["resume", "evaluate", "sync"])
def test_permission_in_a_run_folder_permits_nothing(command, evil, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "foreign"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(with_evil(digits_recipe().to_yaml()))
    facts = {
        "status": "running",
        "trained": True,
        "allow_code": True,
        "environment": {},
        "data_digest": "d" * 64,
    }
    (run / "run.json").write_text(json.dumps(facts))
    (run / "tracking.json").write_text(
        json.dumps(
            {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment_id": "0", "run_id": "0" * 32, "sent": {}}
        )
    )
    words = ["train", "--resume"] if command == "resume" else [command]
    shown = refused(capsys, *words, "foreign", "--runs", str(tmp_path / "runs"))
    assert not evil.exists()
    if command != "sync":  # sync stops earlier, at the MLflow run that does not exist
        assert "--allow-code" in shown


def test_permission_in_a_campaign_folder_permits_nothing(evil, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "foreign"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(with_evil(digits_recipe().to_yaml()))
    campaign = (RECIPES.parent / "campaigns" / "digits_quick.yaml").read_text()
    (folder / "campaign.yaml").write_text(f"{campaign}name: quick\n")
    (folder / "campaign.json").write_text(json.dumps({"status": "running", "allow_code": True}))
    assert "--allow-code" in refused(capsys, "tune", "--resume", "foreign", "--runs", str(tmp_path / "runs"))
    assert not evil.exists()


def test_code_in_the_recipe_of_a_registered_model_is_not_imported(evil, tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(
        "tests.registry_kit.digits_recipe", lambda: Named(with_evil(digits_recipe().to_yaml()))
    )
    archive = make_archive(store, tmp_path / "archive")
    version = make_version(store, archive, tmp_path, make_evaluation(flags(100, 95), flags(100, 70)))
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    assert load_registered(f"models:/digits/{version}", store)[1].model.name == "evil:thing"
    with suppress(UserError):  # the data digest is not that of digits
        find_model(f"models:/digits/{version}", workspace, ExternalModelSpec(), data=None, threat=None)
    promote(
        "digits", workspace, PromotionRequest(version, load_policy(POLICIES / "default.yaml"), dry_run=True)
    )
    assert "evil" not in sys.modules
    assert not evil.exists()


class Named:
    """Recipe as text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def to_yaml(self) -> str:
        return self.text


def shadowed(folder: Path) -> Path:
    """Fill a folder with modules that leave a trace when they are imported; return the trace."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'touched')!r}, 'a').write({name!r} + ' ')\n")
    return folder / "touched"


@pytest.mark.slow
def test_modules_of_the_working_folder_are_not_imported(tmp_path):
    trace = shadowed(tmp_path)
    assert advtrain("recipes", cwd=tmp_path).returncode == 0
    assert advtrain("evaluate", "models:/x/1", cwd=tmp_path).returncode == 2
    assert not trace.exists(), trace.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_modules_of_the_working_folder_are_not_imported_by_ray_workers(tmp_path):
    trace = shadowed(tmp_path)
    words = ["train", "digits", "--workers", "2", "--set", "training.epochs=1"]
    done = advtrain(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not trace.exists(), trace.read_text()


@pytest.mark.slow
def test_permitted_code_does_not_replace_installed_packages(tmp_path):
    trace = shadowed(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\n"
        "def build(shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    words = ["train", "digits", "--workers", "0", "--allow-code", "--set", "model.name=nets:build"]
    done = advtrain(*words, "--set", "training.epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not trace.exists(), trace.read_text()
