"""Start weights and leaks, from training to the gate: another split of the same data is refused."""

from __future__ import annotations

import numpy as np
import pytest

from advtrain.data import DataConfig, load_data
from advtrain.errors import UserError
from advtrain.promotion import load_policy
from advtrain.recipe import load_recipe
from advtrain.registry import copy
from advtrain.registry.versions import load_registered
from pipelines.cli.options import POLICIES
from pipelines.evaluate import Request, evaluate_model
from pipelines.promote import PromotionRequest, promote
from pipelines.train import train
from pipelines.workspace import Workspace
from tests.kit import RECIPES

SHORT = [
    "training.epochs=1",
    "training.num_workers=0",
    "model.name=mlp",
    "evaluation={threat: {eps: 0.1}, suite: quick}",
    "adversary.num_steps=1",
]
FROM = "model.from=models:/digits/1"


def recipe(*overrides):
    return load_recipe(RECIPES / "digits.yaml", [*SHORT, *overrides])


@pytest.mark.slow
def test_a_leak_is_refused_recorded_and_disqualifies(store, tmp_path):
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    parent = train(recipe(), workspace)
    assert [path.stem for path in parent.run.rows.iterdir()] == [parent.run.facts()["data_digest"]]

    leaky = recipe(FROM, "data.split_seed=1", "name=leaky")
    with pytest.raises(UserError, match="samples are training samples of its ancestor models:/digits/1"):
        train(leaky, workspace)
    assert [run.name for run in workspace.runs.glob("*/")] == [parent.run.name]
    train(leaky, workspace, allow_leak="a demo")
    child = train(recipe(FROM, "name=child"), workspace)

    policy = load_policy(POLICIES / "default.yaml")
    for name, verdict in (("leaky", "failed"), ("child", "passed")):
        findings = promote(name, workspace, PromotionRequest(None, policy, dry_run=True)).findings
        (finding,) = [finding for finding in findings if finding.rule == "leaks"]
        assert finding.verdict == verdict, finding
    assert finding.figures == "none, ancestors: models:/digits/1"

    copied = copy("models:/child/1", store, "production")
    lineage = load_registered(copied.uri, store).lineage
    (ancestor,) = lineage.ancestors
    assert (ancestor.reference, ancestor.run) == ("models:/digits/1", parent.run.name)
    assert ancestor.data_digest in lineage.records
    assert "## Ancestors" in (child.run.report / "model_card.md").read_text()

    digits = load_data(DataConfig(source="digits", split_seed=1), tmp_path)
    np.savez(tmp_path / "other.npz", x=digits.test.images / np.float32(255), y=digits.test.labels)
    report = evaluate_model("models:/child/1", workspace, Request(data="other.npz", suite="pgd-1")).report
    known = load_data(DataConfig(source="digits"), tmp_path).train.images
    assert report.training_copies == sum(bool((known == x).all((1, 2, 3)).any()) for x in digits.test.images)
