"""Ray metrics of a run: its state, and what MLflow lacks."""

from __future__ import annotations

import json

import pytest

from advtrain.runs.folder import RunFolder
from advtrain.runs.sealed import sealed_json
from advtrain.tracking import ray_metrics


@pytest.fixture
def shown(monkeypatch):
    """Record the gauges, as a process that is connected to Ray sets them."""
    found: dict[str, float] = {}
    monkeypatch.setattr(ray_metrics, "ray_is_up", lambda: True)
    monkeypatch.setattr(ray_metrics, "_set", lambda name, value, tags: found.update({name: value}))
    return found


@pytest.fixture
def run(tmp_path):
    facts = {"status": "running", "data_digest": ""}
    return RunFolder.create(tmp_path, "digits", "0123456789abcdef", "", facts)


@pytest.mark.parametrize(
    ("status", "running", "failed"),
    [("running", 1, 0), ("finished", 0, 0), ("stopped", 0, 0), ("failed", 0, 1)],
)
def test_show_run_exports_status_before_the_first_progress(run, shown, status, running, failed):
    run.update(status=status)
    ray_metrics.show_run(run, "digits")
    assert shown["advtrain_running"] == running
    assert shown["advtrain_failed"] == failed
    assert "advtrain_step" not in shown


@pytest.mark.parametrize(("sent", "unsent"), [(None, 3), (0, 3), (2, 1), (3, 0)])
def test_show_run_counts_epochs_that_mlflow_lacks(run, shown, sent, unsent):
    for epoch in (1, 2, 3):
        run.append_metrics({"epoch": epoch, "epoch_seconds": 1.0})
    if sent is not None:
        (run.path / "tracking.json").write_text(sealed_json({"epochs": sent}))
    ray_metrics.show_run(run, "digits")
    assert shown["advtrain_unsent_epochs"] == unsent


def test_show_run_ignores_unreadable_files(run, shown):
    (run.path / "run.json").write_text(json.dumps("damaged"))
    ray_metrics.show_run(run, "digits")
    assert shown == {}
