"""campaign -> trials on Ray Tune -> the best confirmed, judged on the test split, registered -> one report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from advtrain.data import Dataset
from advtrain.environment import describe_environment
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, Report
from advtrain.recipe import Recipe, load_recipe
from advtrain.registry import Registered, register
from advtrain.runs.folder import idempotent_start
from advtrain.runs.storage import shared_place
from advtrain.tracking.ray_metrics import show_campaign
from advtrain.tracking.store import open_client
from advtrain.tracking.tracker import ParentRun, Tracker
from pipelines.console import console, table
from pipelines.train import FAILED, STOPPED, judge_on_test, print_where_to_look, signals_go_to
from pipelines.workspace import Workspace, architecture, load_dataset, trained_model
from tuning.campaign import Plan
from tuning.report import Winner, write_report
from tuning.selection import Candidate, Preference, candidates, to_confirm
from tuning.space import with_settings
from tuning.text import duration
from tuning.trials import Ledger, Trial


def tune(plan: Plan, workspace: Workspace, prefer: str | None, once: str | None = None) -> int:
    """Start a new campaign, or with `once` go on with the one started under this key; return the exit code."""
    preference = Preference.parse(prefer, plan.campaign) if prefer is not None else None
    with idempotent_start(workspace.runs, once, "campaign.json") as begun:
        if begun is None:
            ledger, dataset = _begin(plan, workspace, {} if once is None else {"once": once})
    if begun is not None:
        return resume(begun, workspace, {}, prefer)
    with ledger.locked():
        return _drive(ledger, dataset, _parent(ledger, dataset, workspace), workspace, preference)


def _begin(plan: Plan, workspace: Workspace, facts: dict[str, Any]) -> tuple[Ledger, Dataset]:
    """Check everything, and make the campaign's folder."""
    dataset = load_dataset(plan.base, workspace)
    _check_models(plan, dataset)
    open_client(workspace.tracking_uri)  # refuse before anything is written if the store is unusable
    facts |= {
        "status": "running",
        "allow_code": plan.allow_code,
        "environment": describe_environment(),
        "data_digest": dataset.digest,
        "started": time.time(),
    }
    return Ledger.create(workspace.runs, plan, facts), dataset


def _check_models(plan: Plan, dataset: Dataset) -> None:
    """Refuse a model, or values of model.*, with which none can be built."""
    architecture(plan.base, dataset).check()
    for path, distribution in plan.space.items():
        if path.startswith("model."):
            for raw in distribution.extremes():
                value = distribution.value(raw)
                recipe = with_settings(plan.base, {path: value}, "space", allow_code=plan.allow_code)
                try:
                    architecture(recipe, dataset).check()
                except UserError as error:
                    raise UserError(f"space: {path}={value}: {error}") from error


def _parent(ledger: Ledger, dataset: Dataset, workspace: Workspace) -> ParentRun:
    """Return the MLflow run over all trials, made on first use."""
    facts = ledger.facts()
    if "parent" in facts:
        parent = ParentRun(**facts["parent"])
        parent.reopen()
        return parent
    tags = {"advtrain.campaign": ledger.name, "advtrain.data_digest": dataset.digest}
    parent = ParentRun.start(workspace.tracking_uri, ledger.plan.base.name, ledger.name, tags)
    ledger.update(parent=vars(parent))
    return parent


def resume(name: str, workspace: Workspace, changes: dict[str, Any], prefer: str | None) -> int:
    """Go on with a campaign where it stopped, or extend a finished one by a larger budget; return the exit code."""
    ledger = Ledger.find(workspace.runs, name, {})
    with ledger.locked():
        ledger = Ledger.find(workspace.runs, name, changes)  # what another process wrote before it let go
        preference = Preference.parse(prefer, ledger.campaign) if prefer is not None else None
        facts = ledger.facts()
        dataset = load_dataset(ledger.plan.base, workspace, facts["data_digest"])
        ledger.update(status="running")
        return _drive(ledger, dataset, _parent(ledger, dataset, workspace), workspace, preference)


def _drive(
    ledger: Ledger, dataset: Dataset, parent: ParentRun, workspace: Workspace, preference: Preference | None
) -> int:
    """Search, confirm, register and report; keep the campaign's record truthful throughout."""
    watcher = Watcher(ledger, dataset, parent)
    try:
        with signals_go_to(_interrupt), parent.system_metrics():
            started = time.monotonic()
            search(ledger, dataset, watcher, workspace.address)
            searched_s = time.monotonic() - started
            winners = _winners(ledger, dataset, watcher, workspace.address, preference)
        watcher.track_the_rest()
        folder = ledger.folder / "report"
        report = write_report(ledger, winners, folder, watcher.trial_runs())
        ledger.update(status="finished")
        _end(parent, "finished", report.metrics, folder)
    except KeyboardInterrupt:
        ledger.update(status="stopped")
        watcher.pause()
        _end(parent, "stopped")
        console.print(f"\nstopped; `advtrain tune --resume {ledger.name}` goes on", style="yellow")
        return STOPPED
    except BaseException:
        ledger.update(status="failed")
        watcher.pause()
        _end(parent, "failed")
        raise
    for title, columns, rows in report.tables:
        table(title, columns, rows)
    for line in report.remarks:
        console.print(line, markup=False)
    console.print(
        f"searched for {duration(searched_s)} in this sitting; report: {shared_place(folder / 'report.md')}"
    )
    print_where_to_look(parent.uri, parent.experiment_id, parent.run_id)
    return 0 if candidates(ledger) else FAILED


def search(ledger: Ledger, dataset: Dataset, watcher: Watcher, address: str | None) -> None:
    """Run the trials, then the confirmations of the best ones."""
    from tuning.runner import run_confirmations, run_trials  # imports Ray Tune: seconds

    campaign, budget = ledger.campaign, ledger.campaign.budget
    done = sum(trial.status != "running" for trial in ledger.searched)
    console.print(
        f"campaign {ledger.name}: {budget.trials} trials by {campaign.search.algorithm}"
        f"{f', {done} of them are done already' if done else ''}; {campaign.description or campaign.recipe}"
    )
    run_trials(ledger, dataset, watcher, address)
    if campaign.confirm is not None:
        seed, best = ledger.plan.base.seed, to_confirm(ledger)[: campaign.confirm.top]
        wanted = [(c.trial, seed + k) for k in range(1, campaign.confirm.seeds + 1) for c in best]
        if wanted:
            console.print(f"confirming the best {len(best)} with {campaign.confirm.seeds} further seeds each")
            run_confirmations(ledger, dataset, watcher, address, wanted)


def _winners(
    ledger: Ledger, dataset: Dataset, watcher: Watcher, address: str | None, preference: Preference | None
) -> list[Winner]:
    """Judge the best candidates on the test split, and register those whose figure can be trusted."""
    order = candidates(ledger)
    if preference is not None:
        order = preference.order(order)
        if order and not preference.kept_by(order[0]):
            console.print(
                f"no candidate reaches {preference.name} = {preference.floor:g}: the nearest goes first"
            )
    winners: list[Winner] = []
    for candidate in order:
        if len(winners) == ledger.campaign.winners.top:
            break
        winner = _judge(ledger, candidate, dataset, watcher, address)
        if winner is not None:
            winners.append(winner)
    return winners


def _judge(
    ledger: Ledger, candidate: Candidate, dataset: Dataset, watcher: Watcher, address: str | None
) -> Winner | None:
    """Evaluate and register one; None if it turns out to be none to trust."""
    trial = candidate.trial
    recipe = load_recipe(trial.run.path / "recipe.yaml", allow_code=ledger.plan.allow_code)
    console.print(f"{trial.label}:", end=" ")
    report = judge_on_test(trial.run, recipe, dataset, address)
    if isinstance(report, Report) and report.trust == "broken":
        failed = ", ".join(check.name for check in report.checks if check.verdict == "failed")
        ledger.disqualify(trial, f"trust: broken on the test split ({failed})")
        console.print(f"{trial.label} is disqualified: {trial.broken}", style="yellow")
        return None
    return Winner(candidate, report, _register(trial, recipe, dataset, report, watcher))


def _register(
    trial: Trial, recipe: Recipe, dataset: Dataset, report: AnyReport, watcher: Watcher
) -> Registered | None:
    """Register a winner under its recipe's name; None if MLflow is away."""
    tracker = watcher.tracker(trial)
    if tracker is None or not tracker.sync():
        console.print(f"{trial.label} is not registered yet: MLflow is away", style="yellow")
        return None
    model = trained_model(trial.run, recipe, dataset).load()
    registered = register(trial.run, tracker, model, recipe, dataset, report)
    trial.run.update(registered=registered.uri)
    return registered


#: Seconds between looks at the whole campaign for Ray's metrics.
SHOW_S = 2.0


class Watcher:
    """Tells the user and MLflow what becomes of the trials; the only writer to MLflow."""

    def __init__(self, ledger: Ledger, dataset: Dataset, parent: ParentRun) -> None:
        self.ledger, self.dataset, self.parent = ledger, dataset, parent
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
                    console.print(f"not tracked yet: {error}", style="yellow")
                    return None
        return self.trackers[trial.run.name]

    def _recipe(self, trial: Trial) -> Recipe:
        return load_recipe(trial.run.path / "recipe.yaml", allow_code=self.ledger.plan.allow_code)

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
        console.print(
            f"{duration(time.monotonic() - self.started)}  {trial.label}  {shown}  {how}{extra}", markup=False
        )
        found = candidates(self.ledger)
        if found and tracker is not None:
            figures = {f"best_{name}": value for name, value in found[0].figures.items()}
            try:
                self.parent.log(figures, step=len(self.ledger.trials))
            except UserError as error:
                console.print(f"not tracked: {error}", style="yellow")

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


def _end(
    parent: ParentRun, status: str, metrics: dict[str, float] | None = None, folder: Path | None = None
) -> None:
    """End the parent run; if MLflow is away, the same command tells it later."""
    try:
        parent.finish(metrics or {}, folder, status)
    except UserError as error:
        console.print(f"not tracked yet, `advtrain tune --resume` does it later: {error}", style="yellow")


def _interrupt(number: int, frame: object) -> None:
    """End the campaign at once, since all that is done is on disk."""
    raise KeyboardInterrupt
