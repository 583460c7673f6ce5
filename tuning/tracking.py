"""A campaign in MLflow: a run for the campaign, and below it one for each trial."""

from __future__ import annotations

import time
from typing import Any

from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.tracking.ray_metrics import show_campaign
from advtrain.tracking.tracker import ParentRun, Tracker
from tuning.selection import candidates
from tuning.text import duration
from tuning.trials import Ledger, Trial

#: Seconds between looks at the whole campaign for Ray's metrics.
SHOW_S = 2.0


class CampaignTracker:
    """Reports what becomes of the trials, and is the only writer to MLflow."""

    def __init__(
        self, ledger: Ledger, dataset: Dataset, parent: ParentRun, progress: Progress = ignore
    ) -> None:
        self.ledger, self.dataset, self.parent, self.progress = ledger, dataset, parent, progress
        self.trackers: dict[str, Tracker] = {}
        self.started, self.shown = time.monotonic(), 0.0

    def tracker(self, trial: Trial) -> Tracker | None:
        """Return the trial's MLflow run, made on first use; None while the store is away."""
        if trial.run.name not in self.trackers:
            if (trial.run.path / "tracking.json").exists():
                tracker = self.trackers[trial.run.name] = Tracker.reopen(trial.run)
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
        """Tell MLflow that the trials under way are not: the campaign was stopped."""
        for trial in self.ledger.trials:
            if trial.status == "running" and trial.run.name in self.trackers:
                self.trackers[trial.run.name].pause()

    def began(self, trial: Trial) -> None:
        """Make the trial's MLflow run."""
        self.tracker(trial)
        self._show()

    def told(self, trial: Trial, result: dict[str, Any]) -> None:
        """Send an epoch's figures."""
        del result
        if trial.run.name in self.trackers:
            self.trackers[trial.run.name].tick()
        self._show()

    def _show(self) -> None:
        """Export how the campaign goes, not more often than every SHOW_S seconds: it reads every trial's figures."""
        if time.monotonic() - self.shown < SHOW_S:
            return
        self.shown = time.monotonic()
        lines = [line for trial in self.ledger.trials for line in trial.lines()]
        accuracies = [line["robust_accuracy"] for line in lines if "robust_accuracy" in line]
        show_campaign(
            self.ledger.name, [trial.status for trial in self.ledger.trials], max(accuracies, default=None)
        )

    def ended(self, trial: Trial) -> None:
        """Send how it ended, and say it in a line."""
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
        found = candidates(self.ledger)
        if found and tracker is not None:
            figures = {f"best_{name}": value for name, value in found[0].figures.items()}
            try:
                self.parent.log(figures, step=len(self.ledger.trials))
            except UserError as error:
                self.progress(Message(f"not tracked: {error}", "note"))

    def track_the_rest(self) -> None:
        """Bring every trial's MLflow run up to what its folder holds, also of those that ended while it was away."""
        for trial in self.ledger.trials:
            tracker = self.tracker(trial)
            if tracker is not None:
                tracker.sync()

    def trial_runs(self) -> dict[str, str]:
        """Return the MLflow run of each trial by its label."""
        return {
            trial.label: self.trackers[trial.run.name].state["run_id"]
            for trial in self.ledger.trials
            if trial.run.name in self.trackers
        }


def _figures(line: dict[str, Any]) -> str:
    """Return an epoch's validation figures in a few words."""
    if "robust_mae" in line:
        return f"MAE clean {line['clean_mae']:.4g} worst {line['robust_mae']:.4g}"
    return f"clean {100 * line['clean_accuracy']:.1f} %  robust {100 * line['robust_accuracy']:.1f} %"
