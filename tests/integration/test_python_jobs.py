"""The jobs from Python: they return values, report events to a callback, and print nothing."""

from __future__ import annotations

import json

import pytest
import typer

from advtrain.events import EvaluationTick, Message, TrainingTick
from advtrain.promotion import PromotionRequest, load_policy
from advtrain.recipe import load_recipe
from pipelines.cli.main import app
from pipelines.cli.options import POLICIES
from pipelines.models import history, models
from pipelines.promote import promote
from pipelines.train import resume, train
from pipelines.workspace import Workspace
from tests.kit import RECIPES, advtrain

SHORT = [
    "training.epochs=2",
    "training.num_workers=0",
    "model.name=mlp",
    "evaluation={threat: {eps: 0.1}, suite: quick}",
    "adversary.num_steps=2",
]


@pytest.mark.slow
def test_python_jobs_return_values_and_print_nothing(store, tmp_path, capfd):
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    events = []
    result = train(load_recipe(RECIPES / "digits.yaml", SHORT), workspace, progress=events.append)
    assert (result.status, result.registered.uri, result.registered.champion) == (
        "finished",
        "models:/digits/1",
        False,
    )
    assert 0 < result.report.robust_accuracy <= result.report.clean_accuracy <= 1
    assert result.tracking["uri"] == store
    assert {type(event) for event in events} == {Message, TrainingTick, EvaluationTick}
    assert resume(result.run.name, workspace).status == "nothing to do"
    weak = load_policy(POLICIES / "default.yaml").model_copy(
        update={"suite": "quick", "min_worst_class": None, "min_neighbour_share": None, "clean_git": False}
    )
    assert promote("digits", workspace, PromotionRequest(None, weak)).status == "promoted"
    assert promote("digits", workspace, PromotionRequest("1", weak)).status == "already champion"
    (summary,) = models(None, workspace)
    assert [aliases for _, aliases in summary.versions] == [["champion"]]
    assert [decision.kind for decision in history("digits", workspace).decisions] == ["asked", "allowed"]
    assert capfd.readouterr().out == ""

    listed = advtrain("models", "--json", "-", "--tracking-uri", store, cwd=tmp_path)
    assert json.loads(listed.stdout)["digits"][0]["aliases"] == "champion"


def test_commands_that_print_tables_have_json_option():
    commands = typer.main.get_command(app).commands
    tables = {
        "train",
        "tune",
        "compare",
        "evaluate",
        "promote",
        "models",
        "history",
        "predict",
        "shadow",
        "jobs",
    }
    for name in tables:
        assert any(parameter.name == "json" for parameter in commands[name].params), name
