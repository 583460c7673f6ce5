"""MLflow tracking of a campaign: a parent run, and a child run for each trial."""

from __future__ import annotations

import time
from typing import Any

from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.tracking.parent_run import ParentRun
from advtrain.tracking.ray_metrics import show_campaign
from advtrain.tracking.tracker import Tracker
from tuning.selection import Candidate, Ranking
from tuning.text import duration
from tuning.trials import Ledger, Trial

#: Minimum time in seconds between exports of the campaign's state to Ray's metrics.
SHOW_S = 2.0


class CampaignTracker:
    """Watcher that reports the trials' progress; the only writer to MLflow."""

    def __init__(
        self, ledger: Ledger, dataset: Dataset, parent: ParentRun, progress: Progress = ignore
    ) -> None:
        self.ledger, self.dataset, self.parent, self.progress = ledger, dataset, parent, progress
        self.trackers: dict[str, Tracker] = {}
        self.started, self.shown = time.monotonic(), 0.0
        self._ranking: Ranking | None = None  # read with the first trial that ends
        self._unread = {trial.run.name: trial for trial in ledger.trials}  # trials that are not in `_highest`
        self._highest: list[float] = []  # highest robust accuracy of the trials that ended, if there is one

    def tracker(self, trial: Trial) -> Tracker | None:
        """Return the trial's MLflow run, created on first use; None if the store is unreachable."""
        if trial.run.name not in self.trackers:
            if (trial.run.path / "tracking.json").exists():
                tracker = self.trackers[trial.run.name] = Tracker.reopen(trial.run, self.parent.uri)
                tracker.complete_inputs(self._recipe(trial), self.dataset)
            else:
                recipe = self._recipe(trial)
                tags = {"advtrain.campaign": self.ledger.name, "advtrain.trial": trial.label}
                try:
                    self.trackers[trial.run.name] = Tracker.start(
                        trial.run, recipe, self.dataset, self.parent.uri, parent=self.parent.run_id, tags=tags
                    )
                except UserError as error:
                    self.progress(Message(f"not tracked yet: {error}", "note"))
                    return None
        return self.trackers[trial.run.name]

    def _recipe(self, trial: Trial) -> Recipe:
        return load_stored_recipe(trial.run.path / "recipe.yaml", allow_code=self.ledger.plan.allow_code)

    def pause(self) -> None:
        """Mark the running trials as stopped in MLflow, because the campaign was stopped."""
        for trial in self.ledger.trials:
            if trial.status == "running" and trial.run.name in self.trackers:
                self.trackers[trial.run.name].pause()

    def began(self, trial: Trial) -> None:
        """Create the trial's MLflow run."""
        self._unread[trial.run.name] = trial
        self.tracker(trial)
        self._show()

    def on_result(self, trial: Trial, result: dict[str, Any]) -> None:
        """Send the trial's new metrics to MLflow."""
        del result
        if trial.run.name in self.trackers:
            self.trackers[trial.run.name].tick()
        self._show()

    def _show(self) -> None:
        """Export the campaign's state to Ray's metrics, at most once every SHOW_S seconds."""
        if time.monotonic() - self.shown < SHOW_S:
            return
        self.shown = time.monotonic()
        states = [trial.status for trial in self.ledger.trials]
        show_campaign(self.ledger.name, states, self._highest_accuracy())

    def _highest_accuracy(self) -> float | None:
        """Return the highest robust accuracy in any epoch; read the trials that ended once."""
        values = list(self._highest)
        for name, trial in list(self._unread.items()):
            found = [line["robust_accuracy"] for line in trial.lines() if "robust_accuracy" in line]
            values += found
            if trial.status != "running":
                del self._unread[name]
                self._highest = sorted([*found, *self._highest])[-1:]
        return max(values, default=None)

    def _best(self, ended: Trial) -> Candidate | None:
        """Return the best trial so far, one of which just ended."""
        if self._ranking is None:
            self._ranking = Ranking(self.ledger)
        else:
            self._ranking.add(ended)
        return self._ranking.best()

    def ended(self, trial: Trial) -> None:
        """Send the trial's results to MLflow, and report its outcome as a one-line message."""
        self._show()
        tracker = self.tracker(trial)
        if tracker is not None:
            tracker.sync()
        best, reason = trial.best(), trial.disqualified()
        shown = _figures(best) if best is not None else ""
        how = trial.message or trial.status
        extra = f"; disqualified: {reason}" if reason and reason != trial.message else ""
        passed = duration(time.monotonic() - self.started)
        self.progress(Message(f"{passed}  {trial.label}  {shown}  {how}{extra}"))
        first = self._best(trial)
        if first is not None and tracker is not None:
            figures = {f"best_{name}": value for name, value in first.figures.items()}
            try:
                self.parent.log(figures, step=self.ledger.ended)
            except UserError as error:
                self.progress(Message(f"not tracked: {error}", "note"))

    def track_the_rest(self) -> None:
        """Sync every trial's folder to its MLflow run.

        This includes trials that ended while the tracking store was unreachable.
        """
        for trial in self.ledger.trials:
            tracker = self.tracker(trial)
            if tracker is not None:
                tracker.sync()

    def trial_runs(self) -> dict[str, str]:
        """Return the MLflow run ID of each tracked trial, by label."""
        return {
            trial.label: self.trackers[trial.run.name].state["run_id"]
            for trial in self.ledger.trials
            if trial.run.name in self.trackers
        }


def _figures(line: dict[str, Any]) -> str:
    """Format an epoch's validation metrics as a short text."""
    if "robust_mae" in line:
        return f"MAE clean {line['clean_mae']:.4g} worst {line['robust_mae']:.4g}"
    return f"clean {100 * line['clean_accuracy']:.1f} %  robust {100 * line['robust_accuracy']:.1f} %"
