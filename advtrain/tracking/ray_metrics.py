"""Ray metrics of running runs and campaigns, exported to Prometheus: see infra/monitoring.

Only this module writes to Ray's metrics. They show the current state; results are in MLflow.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

from advtrain.cluster import ray_is_up
from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder

#: Name -> description. Ray puts `ray_` before each name.
RUN_METRICS = {
    "advtrain_running": "1 until the run has ended, 0 afterwards: a series that ends with 1 belongs to a lost process",
    "advtrain_failed": "1 after the run ended with an error, else 0",
    "advtrain_unsent_epochs": "finished epochs that MLflow has not received",
    "advtrain_step": "optimizer steps done",
    "advtrain_epoch": "current epoch",
    "advtrain_samples_per_second": "training samples per second, over all workers",
    "advtrain_loss": "mean loss of the current epoch",
    "advtrain_seconds_left": "estimated seconds of training left",
    "advtrain_workers": "workers of the current group",
    "advtrain_interruptions": "times that the worker group was lost, changed its size, or was restarted by --resume",
    "advtrain_guard_recoveries": "collapses that the guard has rolled back",
    "advtrain_validation_clean_accuracy": "clean accuracy on the validation split, in [0, 1]",
    "advtrain_validation_robust_accuracy": "robust accuracy on the validation split, in [0, 1]",
    "advtrain_test_robust_accuracy": "robust accuracy of the finished model on the test split, in [0, 1]",
}
CAMPAIGN_METRICS = {
    "advtrain_trials": "trials of a campaign by state",
    "advtrain_best_robust_accuracy": "best validation robust accuracy of a campaign's trials so far, in [0, 1]",
}
STATES = ("running", "finished", "stopped", "failed")

_gauges: dict[str, Any] = {}


def _set(name: str, value: float, tags: dict[str, str]) -> None:
    """Set a gauge; do nothing if Ray is not running."""
    if not ray_is_up():
        return
    from ray.util.metrics import Gauge

    if name not in _gauges:
        text = (RUN_METRICS | CAMPAIGN_METRICS)[name]
        _gauges[name] = Gauge(name, description=text, tag_keys=tuple(tags))
    _gauges[name].set(value, tags=tags)


def show_run(run: RunFolder, recipe: str) -> None:
    """Export the progress of a run from its folder; unreadable files are ignored."""
    if ray_is_up():
        with suppress(OSError, ValueError, UserError):
            _show_run(run, recipe)


def _show_run(run: RunFolder, recipe: str) -> None:
    tags = {"run": run.name, "recipe": recipe}
    status = run.facts()["status"]
    _set("advtrain_running", float(status == "running"), tags)
    _set("advtrain_failed", float(status == "failed"), tags)
    _set("advtrain_unsent_epochs", _unsent_epochs(run), tags)
    progress = run.progress()
    if progress is None:
        return
    validation = progress["validation"]
    attempts = run.attempts()
    report = run.report / "report.json"
    values = {
        "step": progress["step"],
        "epoch": progress["epoch"],
        "samples_per_second": progress["samples_per_s"],
        "loss": progress["loss"],
        "seconds_left": progress["seconds_left"],
        "workers": attempts[-1]["workers"] if attempts else 1,
        "interruptions": max(0, len(attempts) - 1),
        "guard_recoveries": len(run.recoveries()),
        "validation_clean_accuracy": validation.get("val_clean_accuracy"),
        "validation_robust_accuracy": validation.get("val_robust_accuracy"),
        "test_robust_accuracy": read_record(report).get("robust_accuracy") if report.exists() else None,
    }
    for name, value in values.items():
        if value is not None:
            _set(f"advtrain_{name}", float(value), tags)


def _unsent_epochs(run: RunFolder) -> int:
    tracked = run.path / "tracking.json"
    sent = read_record(tracked).get("epochs", 0) if tracked.exists() else 0
    return sum(line["epoch"] > sent for line in run.metrics())


def show_campaign(name: str, states: list[str], best: float | None) -> None:
    """Export the number of trials in each state, and the best robust accuracy so far."""
    counts = Counter(states)
    for state in STATES:
        _set("advtrain_trials", counts[state], {"campaign": name, "state": state})
    if best is not None:
        _set("advtrain_best_robust_accuracy", best, {"campaign": name})
