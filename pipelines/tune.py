"""Campaigns: search on Ray Tune, confirm, evaluate on the test split, register, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from advtrain.data import Dataset
from advtrain.environment import describe_environment
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, Report
from advtrain.events import Message, Progress, ignore
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.registry import Registered, register
from advtrain.runs.folder import idempotent_start
from advtrain.schema import MOST_SEED
from advtrain.tracking.parent_run import ParentRun
from advtrain.tracking.store import check_store
from advtrain.training.start import with_sources
from advtrain.training.trained_model import trained_model
from pipelines.data import announce
from pipelines.interrupts import interrupt, signal_handlers
from pipelines.start import campaign_weights
from pipelines.train import evaluate_on_test
from pipelines.workspace import (
    Workspace,
    check_machine,
    check_model,
    data_at,
    differs,
    load_dataset,
    moved_data,
)
from tuning.campaign import Plan
from tuning.choice import campaign_params
from tuning.report import CampaignReport, Winner, write_report
from tuning.searchers import Searcher
from tuning.selection import Candidate, Preference, candidates, to_confirm
from tuning.space import combinations
from tuning.tracking import CampaignTracker
from tuning.trials import Ledger, Trial


@dataclass(frozen=True)
class CampaignResult:
    """Result of a campaign."""

    ledger: Ledger
    status: Literal["finished", "stopped"]
    parent: ParentRun  # MLflow run over all trials
    report: CampaignReport | None = None
    seconds: float = 0.0  # search time of this call

    @property
    def folder(self) -> Path:
        """Folder of the report."""
        return self.ledger.folder / "report"

    @property
    def has_winner(self) -> bool:
        """True if any trial qualifies as a winner."""
        return bool(candidates(self.ledger))


def tune(
    plan: Plan,
    workspace: Workspace,
    prefer: str | None = None,
    once: str | None = None,
    *,
    progress: Progress = ignore,
) -> CampaignResult:
    """Search hyperparameters, evaluate the winners on the test split and register them.

    Args:
        plan: campaign, as returned by `tuning.campaign.load_campaign`.
        workspace: locations of runs, data, tracking store and Ray.
        prefer: lower bound on one of two objectives, such as "clean=0.98". It orders the Pareto front.
        once: idempotency key; resumes the campaign that was started under it, or starts one.
        progress: called with each event.
    """
    preference = Preference.parse(prefer, plan.campaign) if prefer is not None else None
    with idempotent_start(workspace.runs, once, "campaign.json") as begun:
        if begun is None:
            ledger, dataset = _begin(plan, workspace, {} if once is None else {"once": once}, progress)
    if begun is not None:
        return resume(
            begun, workspace, {}, prefer, expected=plan, allow_code=plan.allow_code, progress=progress
        )
    with ledger.locked():
        return _drive(ledger, dataset, _parent(ledger, dataset, workspace), workspace, preference, progress)


def _begin(
    plan: Plan, workspace: Workspace, facts: dict[str, Any], progress: Progress
) -> tuple[Ledger, Dataset]:
    """Check all inputs, then create the campaign's folder."""
    check_machine(plan.base, workspace)
    dataset = load_dataset(plan.base, workspace, progress=progress)
    announce(dataset, progress)
    _check_models(plan, dataset, progress)
    check_store(workspace.tracking_uri, plan.base.name)
    weights = campaign_weights(plan, dataset, workspace, progress)
    facts |= {
        "status": "running",
        "environment": describe_environment(plan.base.model.name),
        "data_digest": dataset.digest,
        "started": time.time(),
    }
    source = plan.base.model.from_
    theirs = weights[source].config if source in weights else None
    plan = replace(plan, base=with_sources(plan.base, dataset, theirs))
    return Ledger.create(workspace.runs, plan, facts, weights, dataset), dataset


def _check_models(plan: Plan, dataset: Dataset, progress: Progress) -> None:
    """Raise a UserError if user code cannot be imported or a model cannot be built.

    Models are checked for every combination of the extremes of `model.*` and `training.batch_size`. Paths of start
    weights change no architecture, see `campaign_weights`.
    """
    weights = ("model.from", "model.from_digest", "model.load")
    varied = [
        path
        for path in plan.space
        if path.startswith(("model.", "training.batch_size")) and path not in weights
    ]
    for point, recipe in combinations(plan.space, plan.base, varied, allow_code=plan.allow_code):
        try:
            check_model(recipe, dataset, progress)
        except UserError as error:
            raise UserError(f"space: {point}: {error}" if point else str(error)) from error
        progress = ignore  # the notes about one model are enough


def _parent(ledger: Ledger, dataset: Dataset, workspace: Workspace) -> ParentRun:
    """Return the MLflow run over all trials; create it on first use."""
    facts = ledger.facts()
    if "parent" in facts:
        parent = ParentRun(**facts["parent"]).reopened(workspace.tracking_uri)
    else:
        tags = {"advtrain.campaign": ledger.name, "advtrain.data_digest": dataset.digest}
        parent = ParentRun.start(workspace.tracking_uri, ledger.plan.base.name, ledger.name, tags)
        ledger.update(parent=vars(parent))
    parent.log_params(campaign_params(ledger, []))
    return parent


def resume(
    name: str,
    workspace: Workspace,
    changes: dict[str, Any],
    prefer: str | None = None,
    *,
    expected: Plan | None = None,
    overrides: Sequence[str] = (),
    allow_code: bool = False,
    progress: Progress = ignore,
) -> CampaignResult:
    """Resume a campaign, or extend it with a larger budget (`changes`: path -> value).

    Args:
        expected: plan that the campaign must have, apart from data.path and the budget, which may have been extended;
            any other raises a UserError. None: no check.
        overrides: data.path=PATH if the data has moved; its digest must be the same.
        allow_code: whether the campaign's recipe may name user code.
    """
    moved_to = moved_data(overrides)
    ledger = Ledger.find(workspace.runs, name, {}, allow_code=allow_code)
    with ledger.locked():
        # Another process may have changed it before the lock was held.
        ledger = Ledger.find(workspace.runs, name, changes, allow_code=allow_code)
        preference = Preference.parse(prefer, ledger.campaign) if prefer is not None else None
        facts, base = ledger.facts(), ledger.plan.base
        if expected is not None:
            same = expected.campaign.model_copy(update={"budget": ledger.campaign.budget})
            if same != ledger.campaign or differs(base, expected.base):
                raise UserError(
                    f"campaign '{ledger.name}' was started with other settings; start a new one under another key, "
                    f"or extend it with `advtrain tune --resume {ledger.name}` and --trials or --wall"
                )
            if expected.base.data.path != base.data.path:
                moved_to = expected.base.data.path
        if _searches(ledger) or _confirms(ledger):
            check_machine(base, workspace)
        moved_to = moved_to or facts.get("data_path")
        dataset = load_dataset(
            data_at(base, moved_to), workspace, facts["data_digest"], kept=ledger.folder, progress=progress
        )
        if moved_to is not None:
            ledger.move_data(moved_to)
        ledger.update(status="running")
        return _drive(ledger, dataset, _parent(ledger, dataset, workspace), workspace, preference, progress)


def _drive(
    ledger: Ledger,
    dataset: Dataset,
    parent: ParentRun,
    workspace: Workspace,
    preference: Preference | None,
    progress: Progress,
) -> CampaignResult:
    """Search, confirm, register and report; record the campaign's status at every exit."""
    tracker = CampaignTracker(ledger, dataset, parent, progress)
    try:
        with signal_handlers(interrupt), parent.system_metrics():
            started = time.monotonic()
            search(ledger, dataset, tracker, workspace.address)
            seconds = time.monotonic() - started
            winners = _winners(ledger, dataset, tracker, workspace.address, preference)
        tracker.track_the_rest()
        report = write_report(ledger, winners, ledger.folder / "report", tracker.trial_runs(), preference)
        ledger.update(status="finished")
        _end(ledger, parent, "finished", progress, report)
    except KeyboardInterrupt:
        ledger.update(status="stopped")
        tracker.pause()
        _end(ledger, parent, "stopped", progress)
        return CampaignResult(ledger, "stopped", parent)
    except BaseException:
        ledger.update(status="failed")
        tracker.pause()
        _end(ledger, parent, "failed", progress)
        raise
    return CampaignResult(ledger, "finished", parent, report, seconds)


def search(ledger: Ledger, dataset: Dataset, tracker: CampaignTracker, address: str | None) -> None:
    """Run the trials, then the confirmations of the best ones; start no Ray if all are done."""
    from tuning.runner import run_confirmations, run_trials  # slow: imports Ray Tune

    campaign, budget = ledger.campaign, ledger.campaign.budget
    done = sum(trial.status != "running" for trial in ledger.searched)
    text = (
        f"campaign {ledger.name}: {budget.trials} trials by {campaign.search.algorithm}"
        f"{f', {done} of them are already done' if done else ''}; {campaign.description or campaign.recipe}"
    )
    tracker.progress(Message(text))
    steps = 2 if campaign.confirm is None else 3
    tracker.progress(Message(f"step 1 of {steps}: search"))
    if _searches(ledger):
        run_trials(ledger, dataset, tracker, address)
    if campaign.confirm is not None and (wanted := _wanted(ledger)):
        seeds = campaign.confirm.seeds
        best = len(wanted) // seeds
        text = f"step 2 of 3: confirmation of the best {best} with {seeds} further seeds each"
        tracker.progress(Message(text))
        if _confirms(ledger):
            run_confirmations(ledger, dataset, tracker, address, wanted)


def _searches(ledger: Ledger) -> bool:
    """Return whether trials of the search are open, or the budget permits further ones."""
    if any(trial.status == "running" for trial in ledger.searched):
        return True
    is_spent = ledger.over_budget(ledger.facts()["spent"])
    return not is_spent and Searcher(ledger.campaign).propose(ledger.searched) is not None


def _wanted(ledger: Ledger) -> list[tuple[Trial, int]]:
    """Return the trial and seed of each confirmation."""
    confirm, seed = ledger.campaign.confirm, ledger.plan.base.seed
    if confirm is None:
        return []
    best = to_confirm(ledger)[: confirm.top]
    return [(c.trial, (seed + k) % (MOST_SEED + 1)) for k in range(1, confirm.seeds + 1) for c in best]


def _confirms(ledger: Ledger) -> bool:
    """Return whether confirmations are to be trained."""
    begun = ledger.confirmations
    is_open = any(trial.status == "running" for trial in begun.values())
    return is_open or any((trial.number, seed) not in begun for trial, seed in _wanted(ledger))


def _winners(
    ledger: Ledger,
    dataset: Dataset,
    tracker: CampaignTracker,
    address: str | None,
    preference: Preference | None,
) -> list[Winner]:
    """Evaluate the best candidates on the test split; register those with trusted results."""
    last = 2 if ledger.campaign.confirm is None else 3
    tracker.progress(Message(f"step {last} of {last}: evaluation on the test split, and registration"))
    order = candidates(ledger)
    if preference is not None:
        order = preference.order(order)
        if order and not preference.kept_by(order[0]):
            text = f"no candidate reaches {preference.name} = {preference.floor:g}; starting with the nearest"
            tracker.progress(Message(text))
    winners: list[Winner] = []
    for candidate in order:
        if len(winners) == ledger.campaign.winners.top:
            break
        winner = _judge(ledger, candidate, dataset, tracker, address)
        if winner is not None:
            winners.append(winner)
    return winners


def _judge(
    ledger: Ledger, candidate: Candidate, dataset: Dataset, tracker: CampaignTracker, address: str | None
) -> Winner | None:
    """Evaluate and register one candidate; return None if its result is not trusted."""
    trial = candidate.trial
    recipe = load_stored_recipe(trial.run.path / "recipe.yaml", allow_code=ledger.plan.allow_code)
    tracker.progress(Message(f"{trial.label} is a winner of the search"))
    report = evaluate_on_test(trial.run, recipe, dataset, address, tracker.progress)
    if isinstance(report, Report) and report.trust == "broken":
        failed = ", ".join(check.name for check in report.checks if check.verdict == "failed")
        ledger.disqualify(trial, f"trust: broken on the test split ({failed})")
        tracker.progress(Message(f"{trial.label} is disqualified: {trial.broken}", "note"))
        return None
    return Winner(candidate, report, _register(trial, recipe, dataset, report, tracker))


def _register(
    trial: Trial, recipe: Recipe, dataset: Dataset, report: AnyReport, tracker: CampaignTracker
) -> Registered | None:
    """Register a winner under its recipe's name; return None if MLflow is unreachable."""
    run_tracker = tracker.tracker(trial)
    if run_tracker is None or not run_tracker.can_register():
        tracker.progress(Message(f"{trial.label} is not registered yet: MLflow is unreachable", "note"))
        return None
    model = trained_model(trial.run, recipe, dataset).load()
    registered = register(trial.run, run_tracker, model, recipe, dataset, report)
    trial.run.update(registered=registered.uri)
    return registered


def _end(
    ledger: Ledger, parent: ParentRun, status: str, progress: Progress, report: CampaignReport | None = None
) -> None:
    """End the parent run; if MLflow is unreachable, a later resume ends it."""
    try:
        if report is None:
            parent.finish({}, None, status)
            return
        parent.log_params(report.params)
        parent.finish(report.metrics, ledger.folder / "report", status, report.tags, step=len(ledger.trials))
    except UserError as error:
        text = f"not tracked yet; `advtrain tune --resume` tracks it later: {error}"
        progress(Message(text, "note"))
