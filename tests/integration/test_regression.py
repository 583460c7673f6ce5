"""A regression end to end: trained, evaluated, registered, loaded and evaluated again."""

from __future__ import annotations

import numpy as np
import pytest

from advtrain.evaluation import RegressionReport, load_report
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from pipelines.evaluate import Request
from pipelines.model_ref import ExternalModelSpec
from pipelines.workspace import Workspace
from tests.cli_kit import evaluate_model, train
from tests.kit import RECIPES


def test_regression_is_trained_evaluated_registered_and_reevaluated(store, tmp_path, capsys):
    recipe = load_recipe(
        RECIPES / "diabetes.yaml",
        ["training.epochs=3", "optimizer.ema_decay=0.9", "evaluation.attack.num_restarts=2"],
    )
    workspace = Workspace(runs=tmp_path / "runs", tracking_uri=store, data_root=tmp_path)
    assert train(recipe, workspace, allow_code=False) == 0
    shown = capsys.readouterr().out
    assert "val MAE clean" in shown
    assert "worst-case RMSE, pgd-mae-50x2" in shown

    (run,) = (RunFolder(path) for path in (tmp_path / "runs").iterdir())
    report = load_report(run.report)
    assert isinstance(report, RegressionReport)
    assert {p.name for p in run.report.iterdir()} == {
        "report.json",
        "report.html",
        "model_card.md",
        "samples.parquet",
        "robustness_curve.png",
    }

    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(store)
    version = client.get_model_version_by_alias("diabetes", "challenger")
    assert float(version.tags["advtrain.robust_mae"]) == pytest.approx(report.robust_mae.value, rel=1e-5)
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["test/robust_rmse"] == pytest.approx(report.robust_rmse.value)
    assert metrics["val/average_robust_mae"] > 0
    predicted = mlflow.pyfunc.load_model("models:/diabetes@challenger").predict(
        np.full((3, 10), 0.5, np.float32)
    )
    assert predicted.shape == (3, 1)
    assert 25 < predicted.mean() < 346  # in the target's units

    code = evaluate_model(
        "models:/diabetes@challenger", workspace, Request(), ExternalModelSpec(), json=tmp_path / "r.json"
    )
    assert code == 0
    again = RegressionReport.model_validate_json((tmp_path / "r.json").read_text())
    assert again.robust_mae.value == pytest.approx(report.robust_mae.value, rel=1e-4)
