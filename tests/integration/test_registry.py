"""Registered models, which load without this project."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from advtrain.data import Place, load_data
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from advtrain.tracking.metrics import GROUPS
from advtrain.training.trained_model import trained_model
from tests.kit import advtrain, user_environment

STRANGER = """
import json, os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("advtrain", "pipelines"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digits/1")
for name in ("inputs", "one"):
    numpy.save(f"{name}-out.npy", model.predict(numpy.load(f"{name}.npy")))
refused = []
for wrong in (numpy.zeros((2, 1, 9, 9), numpy.float32), numpy.zeros((2, 1, 8, 8), numpy.int64)):
    try:
        model.predict(wrong)
    except Exception as error:
        refused.append(type(error).__name__)
print(json.dumps([refused, [m for m in sys.modules if m.split(".")[0] in ("advtrain", "pipelines")]]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the demo recipe was trained and registered."""
    folder = tmp_path_factory.mktemp("trained")
    done = advtrain(
        "train",
        "digits",
        "--workers",
        "0",
        "--set",
        "training.epochs=4",
        "--set",
        "optimizer.ema_decay=0.9",
        "--set",
        "evaluation.suite=pgd-10x2",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def the_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs").glob("digits-*")
    return RunFolder(path)


def test_registered_model_loads_without_advtrain_or_pickle_and_matches_trainer(
    trained,
):
    run = the_run(trained)
    recipe = load_recipe(run.path / "recipe.yaml")
    data = load_data(recipe.data, Path())
    x = next(data.test.batches(400, Place())).x
    np.save(trained / "inputs.npy", x.numpy())
    np.save(trained / "one.npy", x[:1].numpy())
    (trained / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, "-P", "stranger.py", f"sqlite:///{trained / 'mlflow.db'}"],
        cwd=trained,
        env={k: v for k, v in user_environment().items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    refused, ours = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    assert len(refused) == 2, "the signature must refuse a wrong shape and a wrong type"
    with torch.no_grad():
        expected = trained_model(run, recipe, data).load()(x).numpy()
    assert np.allclose(np.load(trained / "inputs-out.npy"), expected, atol=1e-5)
    assert np.allclose(np.load(trained / "one-out.npy"), expected[:1], atol=1e-5)


def test_archive_contains_no_pickle(trained):
    (archive,) = trained.rglob("model.pt2")
    names = zipfile.ZipFile(archive).namelist()
    assert names
    assert not [n for n in names if n.endswith((".pkl", ".pickle"))]


def test_registered_version_has_provenance_tags(trained):
    run = the_run(trained)
    version = client(trained).get_model_version_by_alias("digits", "challenger")
    report = json.loads((run.report / "report.json").read_text())
    assert str(version.version) == "1"
    assert version.tags["advtrain.run"] == run.name
    assert version.tags["advtrain.data_digest"] == report["data_digest"]
    assert version.tags["advtrain.threat"] == "linf:0.1"
    assert float(version.tags["advtrain.robust_accuracy"]) == pytest.approx(
        report["robust_accuracy"], abs=1e-6
    )
    assert float(version.tags["advtrain.clean_accuracy"]) == pytest.approx(report["clean_accuracy"], abs=1e-6)
    assert version.run_id == client(trained).get_run(version.run_id).info.run_id


def test_mlflow_run_has_params_metrics_tags_and_artifacts(trained):
    run = the_run(trained)
    recipe = load_recipe(run.path / "recipe.yaml")
    tracked = client(trained).get_run(
        client(trained).get_model_version_by_alias("digits", "challenger").run_id
    )
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["adversary.eps"] == "0.1"
    assert set(tracked.data.params) == {path for path, value, _ in recipe.leaves() if value is not None}
    for metric in (
        "train/loss",
        "val/clean_accuracy",
        "val/robust_accuracy",
        "val/average_robust_accuracy",
        "train/lr",
        "system/samples_per_s",
        "test/clean_accuracy",
        "test/robust_accuracy",
    ):
        assert metric in tracked.data.metrics
    assert {metric.split("/")[0] for metric in tracked.data.metrics} == set(GROUPS)
    assert not {"epoch", "step"} & {metric.split("/")[-1] for metric in tracked.data.metrics}
    assert "mlflow.source.git.commit" not in tracked.data.tags  # the working folder is no repository
    assert "advtrain.git_dirty" not in tracked.data.tags
    assert tracked.data.tags["advtrain.version.torch"] == torch.__version__.split("+")[0]
    assert {i.dataset.name for i in tracked.inputs.dataset_inputs} == {
        "digits-train",
        "digits-validation",
        "digits-test",
    }
    artifacts = {a.path for a in client(trained).list_artifacts(tracked.info.run_id)}
    reports = {a.path for a in client(trained).list_artifacts(tracked.info.run_id, "report")}
    assert "recipe.yaml" in artifacts
    pictures = {"report/robustness_curve.png", "report/examples.png"}
    texts = {f"report/{n}" for n in ("report.json", "report.html", "model_card.md", "samples.parquet")}
    assert reports == pictures | texts


@pytest.mark.slow
def test_second_model_is_registered_without_champion_alias(trained):
    done = advtrain(
        "train",
        "digits",
        "--workers",
        "0",
        "--runs",
        "more",
        "--set",
        "training.epochs=1",
        "--set",
        "evaluation.suite=quick",
        cwd=trained,
    )
    assert done.returncode == 0, done.stderr
    assert "champion" not in client(trained).get_registered_model("digits").aliases
    assert {str(v.version) for v in client(trained).search_model_versions("name = 'digits'")} == {"1", "2"}


@pytest.mark.parametrize(
    "what", ["uri", *(pytest.param(what, marks=pytest.mark.slow) for what in ("run", "checkpoint"))]
)
def test_evaluate_accepts_uri_run_and_checkpoint(trained, what):
    run = the_run(trained)
    target = {
        "uri": "models:/digits/1",
        "run": run.name,
        "checkpoint": str(sorted(run.checkpoints.glob("step-*"))[-1]),
    }[what]
    options = ("--threat", "linf:0.05", "--suite", "pgd-10x2", "--json", f"{what}.json")
    done = advtrain("evaluate", target, *options, cwd=trained)
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / f"{what}.json").read_text())
    assert report["eps"] == 0.05
    own = json.loads((run.report / "report.json").read_text())
    assert report["clean_accuracy"] == pytest.approx(
        own["clean_accuracy"], abs=0.05 if what == "checkpoint" else 1e-9
    )
    assert report["clean_accuracy"] >= report["robust_accuracy"] >= own["robust_accuracy"] - 0.05


@pytest.mark.slow
def test_evaluate_rejects_data_changed_since_training(trained, tmp_path):
    """A larger npz is split differently. Its test split may contain training samples of the model."""
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 8, 8), dtype=np.float32), np.arange(200) % 10
    np.savez(tmp_path / "d.npz", x=x[:150], y=y[:150])
    small = ["--workers", "0", "--set", "training.epochs=1", "--set", "data={source: npz, path: d.npz}"]
    done = advtrain("train", "digits", *small, "--data-root", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert advtrain("evaluate", "models:/digits/1", "--data-root", ".", cwd=tmp_path).returncode == 0
    np.savez(tmp_path / "d.npz", x=x, y=y)
    refused = advtrain("evaluate", "models:/digits/1", "--data-root", ".", cwd=tmp_path)
    assert refused.returncode == 2
    assert "data has changed since training" in refused.stderr
