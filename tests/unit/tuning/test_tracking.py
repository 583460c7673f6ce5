"""The metrics of a campaign's MLflow run while trials end."""

from __future__ import annotations

from types import SimpleNamespace

from tests.unit.tuning.surface import ledger_of, show
from tuning.tracking import CampaignTracker

POINT = {"optimizer.lr": 1e-2, "adversary.eps": 0.1}


def test_step_of_the_best_metrics_is_the_number_of_ended_trials(tmp_path):
    ledger, logged = ledger_of(tmp_path), []
    parent = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics["best_robust_accuracy"])))
    tracker = CampaignTracker(ledger, None, parent)
    trials = [ledger.begin(POINT, {}) for _ in range(3)]  # at the same time
    for trial, robust in zip(trials, (0.5, 0.7, 0.6), strict=True):
        tracker.trackers[trial.run.name] = SimpleNamespace(sync=lambda: True)
        show(trial, (robust, 0.9))
        ledger.close(trial, "finished")
        tracker.ended(trial)
    assert logged == [(1, 0.5), (2, 0.7), (3, 0.7)]
