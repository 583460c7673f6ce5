"""The shipped campaign over word embeddings, on a few questions, on real Ray Tune and MLflow."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from pipelines.cli.options import CAMPAIGNS
from pipelines.predict import predict
from pipelines.workspace import Workspace
from tests.cli_kit import tune
from tests.text_kit import text_recipe
from tuning.campaign import load_campaign
from tuning.trials import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_champion_of_a_campaign_over_texts_has_the_tokenizer_of_its_trial(ray_cluster, store, tmp_path):
    (tmp_path / "questions.yaml").write_text(text_recipe(tmp_path, "training.epochs=1").to_yaml())
    changes = {"budget.trials": 2, "confirm": None}
    plan = load_campaign(
        CAMPAIGNS / "trec.yaml", lambda name: tmp_path / "questions.yaml", [], changes, allow_code=False
    )
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    assert tune(plan, workspace, None) == 0
    (folder,) = workspace.runs.glob("trec-*-1")
    trials = Ledger.find(workspace.runs, folder.name, {}).searched
    assert [trial.status for trial in trials] == ["finished"] * 2
    assert trials[0].point.keys() == plan.space.keys()
    registered = Path(mlflow.artifacts.download_artifacts("models:/questions/1", tracking_uri=store))
    texts = {(trial.run.path / "tokenizer.json").read_text() for trial in trials}
    assert texts == {(registered / "tokenizer.json").read_text()}
    found = predict("models:/questions/1", None, workspace, texts=["who is it ?", "where is it ?"])
    assert {record["name"] for record in found.records} <= {"human", "location"}
