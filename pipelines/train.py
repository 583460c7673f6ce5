"""Training runs: train a recipe, evaluate on the test split, register the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from advtrain.cluster import ray_is_up
from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, EvalSpec, Workers, draw_figures, evaluate, load_report
from advtrain.events import Message, Progress, TrainingTick, evaluation_progress, ignore
from advtrain.recipe import Recipe, load_stored_recipe, parse_override
from advtrain.recipe.digest import PLACEMENT
from advtrain.registry import Registered, register
from advtrain.runs.folder import RunFolder, idempotent_start
from advtrain.runs.lineage import ancestors_in
from advtrain.tracking.ray_metrics import show_run
from advtrain.tracking.store import check_store
from advtrain.tracking.tracker import Tracker
from advtrain.training import Outcome, launch
from advtrain.training.start import prepare_start
from advtrain.training.trained_model import move_hint, trained_model
from pipelines.data import announce
from pipelines.interrupts import interrupt, signal_handlers
from pipelines.leaks import ALLOW_LEAK, check_training
from pipelines.start import announced, write_inputs
from pipelines.workspace import (
    Workspace,
    about_report,
    check_machine,
    check_model,
    data_at,
    differs,
    first_facts,
    load_dataset,
    moved_data,
    training_threat,
)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run."""

    run: RunFolder
    status: Literal["finished", "stopped", "failed", "nothing to do"]
    message: str = ""
    report: AnyReport | None = None  # on the test split
    registered: Registered | None = None  # None: not finished, or MLflow was unreachable
    tracking: dict[str, str] | None = None  # uri, experiment_id and run_id in MLflow


def train(
    recipe: Recipe,
    workspace: Workspace,
    *,
    allow_code: bool = False,
    allow_leak: str | None = None,
    once: str | None = None,
    progress: Progress = ignore,
) -> TrainResult:
    """Train a recipe, evaluate the model on the test split and register it.

    Args:
        recipe: recipe to train.
        workspace: locations of runs, data, tracking store and Ray.
        allow_code: whether the recipe may name user code.
        allow_leak: reason for which a leak is allowed, which rules out a promotion; None: it is refused.
        once: idempotency key; resumes the run that was started under it, or starts one.
        progress: called with each event.

    Raises:
        UserError: data, model or store cannot be used, or there is a leak; no run is created then.
    """
    with idempotent_start(workspace.runs, once, "run.json") as begun:
        if begun is None:
            if recipe.training.num_workers != 0:
                check_machine(recipe, workspace)
            dataset = load_dataset(recipe, workspace, progress=progress)
            summary = announce(dataset, progress)
            check_model(recipe, dataset, progress)
            check_store(workspace.tracking_uri, recipe.name)
            start = prepare_start(recipe, dataset, workspace.weights)
            recipe = announced(start, progress).recipe
            facts = check_training(dataset, start.ancestors, start.records, allow_leak, progress, ALLOW_LEAK)
            facts |= first_facts(recipe, dataset) | ({} if once is None else {"once": once})
            text, digest = recipe.to_yaml(), recipe.digest()
            write = partial(write_inputs, start=start, dataset=dataset, summary=summary)
            run = RunFolder.create(workspace.runs, recipe.name, digest, text, facts, write)
    if begun is not None:
        return resume(begun, workspace, expected=recipe, allow_code=allow_code, progress=progress)
    with run.locked():
        tracker = _start_tracking(run, recipe, dataset, workspace)
        progress(Message(f"run {run.name}: {recipe.description or recipe.name}"))
        return _drive(run, recipe, dataset, tracker, workspace, progress)


def resume(
    name: str,
    workspace: Workspace,
    *,
    expected: Recipe | None = None,
    num_workers: int | None = None,
    overrides: Sequence[str] = (),
    allow_code: bool = False,
    progress: Progress = ignore,
) -> TrainResult:
    """Resume a run from its last checkpoint; do nothing if it is finished.

    Args:
        name: name or folder of the run.
        expected: recipe that the run must have; any other raises a UserError. None: no check.
        num_workers: number of Ray Train workers from now on; None: unchanged.
        overrides: `path=value` settings from now on. They must be settings that do not affect the result, or data.path,
            if the data there has the same digest.
        allow_code: whether the run's recipe may name user code.
    """
    moved_to = moved_data(overrides, [f"training.{key}" for key in PLACEMENT])
    run = RunFolder.find(workspace.runs, name)
    with run.locked():
        facts = run.facts()
        changes = [text for text in overrides if parse_override(text)[0] != "data.path"]
        changes += [] if num_workers is None else [f"training.num_workers={num_workers}"]
        recipe = load_stored_recipe(run.path / "recipe.yaml", changes, allow_code=allow_code)
        if expected is not None and differs(recipe, expected):
            raise UserError(
                f"run '{run.name}' was started with another recipe ({recipe.digest()[:6]}, not "
                f"{expected.digest()[:6]}); resume without RECIPE and --set, or start a new run"
            )
        if expected is not None and expected.data.path != recipe.data.path:
            moved_to = expected.data.path
        finished = facts["status"] == "finished"
        if finished and moved_to is None:
            return TrainResult(run, "nothing to do", f"run {run.name} is finished; nothing to do")
        if recipe.training.num_workers != 0 and not facts["trained"]:
            check_machine(recipe, workspace)
        moved_to = facts.get("data_path") if moved_to is None else moved_to
        dataset = load_dataset(
            data_at(recipe, moved_to), workspace, facts["data_digest"], kept=run.path, progress=progress
        )
        place = {} if moved_to is None else {"data_path": moved_to}
        if finished:
            run.update(**place)
            return TrainResult(
                run, "nothing to do", f"run {run.name} is finished; its data is at '{moved_to}' now"
            )
        run.update(status="running", message="", **place)
        if (run.path / "tracking.json").exists():
            tracker = Tracker.reopen(run, workspace.tracking_uri)
            tracker.complete_inputs(recipe, dataset)
            tracker.sync()  # before the system monitor, which stops if MLflow shows an ended run
        else:
            tracker = _start_tracking(run, recipe, dataset, workspace)
        progress(Message(f"run {run.name}: resuming"))
        return _drive(run, recipe, dataset, tracker, workspace, progress)


def sync(
    name: str, workspace: Workspace, *, allow_code: bool = False, progress: Progress = ignore
) -> TrainResult:
    """Send pending records to MLflow; evaluate and register a trained run if still needed.

    Args:
        allow_code: whether the run's recipe may name user code.
    """
    run = RunFolder.find(workspace.runs, name)
    with run.locked():
        facts = run.facts()
        tracker = Tracker.reopen(run, workspace.tracking_uri)
        if not tracker.sync():
            raise UserError(
                f"MLflow at {tracker.state['uri']} is still unreachable ({tracker.reason}); nothing is lost, try again "
                "later"
            )
        if facts.get("trained") and facts["status"] != "finished":
            recipe = load_stored_recipe(run.path / "recipe.yaml", allow_code=allow_code)
            at, digest = data_at(recipe, facts.get("data_path")), facts["data_digest"]
            dataset = load_dataset(
                at, workspace, digest, moved=move_hint(run), kept=run.path, progress=progress
            )
            tracker.complete_inputs(recipe, dataset)
            return _finish(run, recipe, dataset, tracker, workspace.address, progress)
        return TrainResult(run, "nothing to do", f"run {run.name}: everything is tracked in MLflow")


def _start_tracking(run: RunFolder, recipe: Recipe, dataset: Dataset, workspace: Workspace) -> Tracker:
    try:
        return Tracker.start(run, recipe, dataset, workspace.tracking_uri)
    except BaseException as error:
        run.update(status="failed", message=f"tracking could not be started: {error}")
        raise


def _drive(
    run: RunFolder,
    recipe: Recipe,
    dataset: Dataset,
    tracker: Tracker,
    workspace: Workspace,
    progress: Progress,
) -> TrainResult:
    """Train if needed, evaluate and register; record the run's status at every exit."""
    try:
        if not run.facts()["trained"]:
            outcome = _train(run, recipe, dataset, tracker, workspace, progress)
            if outcome.status != "finished":
                run.update(status=outcome.status, message=outcome.message)
                tracker.sync()
                status: Any = outcome.status
                return TrainResult(run, status, outcome.message)
            run.update(trained=True)
        with signal_handlers(interrupt):
            return _finish(run, recipe, dataset, tracker, workspace.address, progress)
    except KeyboardInterrupt:
        run.update(status="stopped", message="interrupted")
        tracker.sync()
        return TrainResult(run, "stopped", "interrupted")
    except Exception as error:
        with suppress(OSError):  # on a full disk, report the first error
            run.update(status="failed", message=str(error))
            tracker.sync()
        raise
    finally:
        show_run(run, recipe.name)


def _train(
    run: RunFolder,
    recipe: Recipe,
    dataset: Dataset,
    tracker: Tracker,
    workspace: Workspace,
    progress: Progress,
) -> Outcome:
    with _stop_on_signal(run, progress), tracker.system_metrics():

        def tick() -> None:
            progress(TrainingTick(run))
            tracker.tick()
            show_run(run, recipe.name)

        training = recipe.training
        low, high = training.min_workers, training.max_workers
        where = f"on {low if low == high else f'{low} to {high}'} workers" if high else "in this process"
        done = f" ({found} done)" if (found := len(run.metrics())) else ""
        progress(Message(f"step 1 of 3: training, {training.epochs} epochs{done} {where}"))
        progress(TrainingTick(run))  # before the first epoch: earlier epochs are not new
        outcome = launch(recipe, dataset, run, address=workspace.address, tick=tick)
        tick()
    return outcome


@contextmanager
def _stop_on_signal(run: RunFolder, progress: Progress) -> Iterator[None]:
    """Save a checkpoint and stop at the first Ctrl-C or SIGTERM; interrupt at the second."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        run.request_stop()
        progress(Message("\nstopping: saving a checkpoint (repeat to stop immediately)", "note"))

    with signal_handlers(handle):
        yield


def _finish(
    run: RunFolder,
    recipe: Recipe,
    dataset: Dataset,
    tracker: Tracker,
    address: str | None,
    progress: Progress,
) -> TrainResult:
    """Evaluate on the test split, draw figures, register; skip steps that are done."""
    progress(Message("step 2 of 3: evaluation on the test split"))
    report = evaluate_on_test(run, recipe, dataset, address, progress)
    registered = None
    progress(Message("step 3 of 3: registration in MLflow"))
    if tracker.can_register():
        model = trained_model(run, recipe, dataset).load()
        registered = register(run, tracker, model, recipe, dataset, report)
        run.update(status="finished", message="", registered=registered.uri)
        tracker.sync()
    else:
        run.update(message="trained and evaluated; not registered yet: MLflow is unreachable")
    tracking = {key: str(tracker.state[key]) for key in ("uri", "experiment_id", "run_id")}
    return TrainResult(run, "finished", "", report, registered, tracking)


def evaluate_on_test(
    run: RunFolder, recipe: Recipe, dataset: Dataset, address: str | None, progress: Progress = ignore
) -> AnyReport:
    """Return the test report of the run's best model; create it on the first call."""
    source, judge = trained_model(run, recipe, dataset), recipe.evaluation
    if not (run.report / "report.json").exists():
        spec = EvalSpec(
            source,
            dataset.test,
            dataset,
            judge.judged_with,
            judge.threat_model,
            name=run.name,
            seed=judge.seed,
            batch_size=judge.batch_size,
            full=True,
            training_threat=training_threat(recipe),
            command=f"advtrain evaluate {run.name}",
        )
        attacks = ", ".join(spec.attack_names)
        progress(Message(f"{len(dataset.test):,} test samples, attacked by {attacks}"))
        started = time.monotonic()
        found = evaluate(
            spec,
            workers=Workers(None if recipe.training.num_workers or ray_is_up() else 0, address),
            cache=run.evaluations,
            progress=evaluation_progress(progress),
        )
        draw_figures(source.load(), dataset, found.report, judge.threat_model, run.report, seed=judge.seed)
        about = about_report(recipe, time.monotonic() - started, run.training_seconds())
        found.save(run.report, about, ancestors_in(run.facts()))  # last: an existing report is complete
    return load_report(run.report)
