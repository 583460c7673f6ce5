"""The metrics of a campaign's MLflow run while trials end."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from tests.unit.tuning.surface import ledger_of, show
from tests.unit.tuning.synthetic import TWO, SyntheticLedger, campaign_of, run_trial
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


@pytest.mark.parametrize("count", [100, 1_000])
def test_end_of_a_trial_reads_no_other_trial(count, monkeypatch):
    ledger, generator, shown = SyntheticLedger(campaign_of(TWO)), random.Random(0), []
    monkeypatch.setattr("tuning.tracking.SHOW_S", 0.0)
    monkeypatch.setattr("tuning.tracking.show_campaign", lambda name, states, best: shown.append(best))
    tracker = CampaignTracker(ledger, None, SimpleNamespace(log=lambda metrics, step: None))
    for _ in range(count):
        trial = run_trial(ledger, generator)
        trial.run.path, before = None, ledger.reads.metrics
        tracker.trackers[trial.run.name] = SimpleNamespace(sync=lambda: True)
        tracker.began(trial), tracker.ended(trial)
        assert ledger.reads.metrics - before <= 4
    assert shown[-1] == max(trial.best()["robust_accuracy"] for trial in ledger.trials)
