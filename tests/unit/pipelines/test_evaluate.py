"""Two models are compared only under the same threat model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from advtrain.errors import UserError
from advtrain.recipe.edits import EditThreatConfig
from pipelines import evaluate
from pipelines.model_ref import ExternalModelSpec
from pipelines.workspace import Workspace


def under_test(**settings):
    threat = EditThreatConfig.model_validate({"edits": "words", "at_most": 2} | settings)
    return SimpleNamespace(dataset=SimpleNamespace(digest="d" * 64), judge=SimpleNamespace(threat=threat))


def second(monkeypatch, **settings):
    other = under_test(**settings)
    monkeypatch.setattr(evaluate, "find_model", lambda *_, **__: other)
    workspace = Workspace(Path("runs"), "sqlite:///m.db", Path("data"))
    found = evaluate._second("other", under_test(), workspace, ExternalModelSpec(), evaluate.Request())
    assert found is other


def test_second_model_may_have_another_validation_budget(monkeypatch):
    second(monkeypatch, validation_budget=7)


@pytest.mark.parametrize("settings", [{"budget": 7}, {"at_most": 1}, {"protect": "none"}])
def test_second_model_needs_the_same_edits(monkeypatch, settings):
    with pytest.raises(UserError, match="'other' is evaluated under another threat model"):
        second(monkeypatch, **settings)
