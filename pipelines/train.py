"""recipe -> run: train, evaluate on the test split, register."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.cluster import ray_is_up
from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, EvalSpec, Report, Workers, draw_figures, evaluate, load_report
from advtrain.recipe import Recipe, load_recipe
from advtrain.registry import Registered, register
from advtrain.runs.folder import RunFolder, idempotent_start
from advtrain.runs.storage import shared_place
from advtrain.tracking.ray_metrics import show_run
from advtrain.tracking.store import open_client
from advtrain.tracking.tracker import Tracker
from advtrain.training import Outcome, describe_recovery, launch
from pipelines.console import console, evaluation_view, progress_view, table
from pipelines.workspace import (
    Workspace,
    architecture,
    first_facts,
    load_dataset,
    trained_model,
    training_threat,
)
from tuning.text import duration

#: Exit codes beside 0: 1 failed, 2 bad input, 130 stopped (as the shell reports Ctrl-C).
FAILED, STOPPED = 1, 130


def train(recipe: Recipe, workspace: Workspace, *, allow_code: bool, once: str | None = None) -> int:
    """Start a new run, or with `once` go on with the one that was started under this key; return the exit code."""
    with idempotent_start(workspace.runs, once, "run.json") as begun:
        if begun is None:
            dataset = load_dataset(recipe, workspace)
            architecture(recipe, dataset).check()
            open_client(workspace.tracking_uri)  # refuse before anything is written if the store is unusable
            facts = first_facts(dataset, allow_code) | ({} if once is None else {"once": once})
            run = RunFolder.create(workspace.runs, recipe.name, recipe.digest(), recipe.to_yaml(), facts)
    if begun is not None:
        return resume(begun, workspace, expected=recipe, num_workers=None)
    with run.locked():
        tracker = _start_tracking(run, recipe, dataset, workspace)
        console.print(f"run {run.name}: {recipe.description or recipe.name}")
        return _drive(run, recipe, dataset, tracker, workspace)


def resume(name: str, workspace: Workspace, *, expected: Recipe | None, num_workers: int | None) -> int:
    """Go on with a run where it stopped; a finished one is left alone. Return the exit code."""
    run = RunFolder.find(workspace.runs, name)
    with run.locked():
        facts = run.facts()
        overrides = [] if num_workers is None else [f"training.num_workers={num_workers}"]
        recipe = load_recipe(run.path / "recipe.yaml", overrides, allow_code=facts["allow_code"])
        if expected is not None and expected.digest() != recipe.digest():
            raise UserError(
                f"run '{run.name}' was started with another recipe ({recipe.digest()[:6]}, not "
                f"{expected.digest()[:6]}); resume without RECIPE and --set, or start a new run"
            )
        if facts["status"] == "finished":
            console.print(
                f"run {run.name} is finished; nothing to do (its report: {shared_place(run.report)})"
            )
            return 0
        dataset = load_dataset(recipe, workspace, facts["data_digest"])
        run.update(status="running", message="")
        if (run.path / "tracking.json").exists():
            tracker = Tracker.reopen(run)
            tracker.complete_inputs(recipe, dataset)
            tracker.sync()  # before the system monitor, which ends where MLflow says that the run has ended
        else:
            tracker = _start_tracking(run, recipe, dataset, workspace)
        console.print(f"run {run.name}: resuming")
        return _drive(run, recipe, dataset, tracker, workspace)


def sync(name: str, workspace: Workspace) -> int:
    """Send what MLflow has not got yet; evaluate and register if only that is missing."""
    run = RunFolder.find(workspace.runs, name)
    with run.locked():
        facts = run.facts()
        tracker = Tracker.reopen(run)
        if not tracker.sync():
            raise UserError(
                f"MLflow at {tracker.state['uri']} is still away; nothing is lost, try again later"
            )
        if facts["trained"] and facts["status"] != "finished":
            recipe = load_recipe(run.path / "recipe.yaml", allow_code=facts["allow_code"])
            dataset = load_dataset(recipe, workspace, facts["data_digest"])
            tracker.complete_inputs(recipe, dataset)
            return _finish(run, recipe, dataset, tracker, workspace.address)
        console.print(f"run {run.name}: MLflow has everything")
        return 0


def _start_tracking(run: RunFolder, recipe: Recipe, dataset: Dataset, workspace: Workspace) -> Tracker:
    try:
        return Tracker.start(run, recipe, dataset, workspace.tracking_uri)
    except BaseException as error:
        run.update(status="failed", message=f"tracking could not be started: {error}")
        raise


def _drive(run: RunFolder, recipe: Recipe, dataset: Dataset, tracker: Tracker, workspace: Workspace) -> int:
    """Train if that is not done yet, then evaluate and register; keep the run's record truthful throughout."""
    try:
        if not run.facts()["trained"]:
            outcome = _train(run, recipe, dataset, tracker, workspace)
            if outcome.status != "finished":
                run.update(status=outcome.status, message=outcome.message)
                tracker.sync()
                hint = f"; `advtrain train --resume {run.name}` goes on from the last checkpoint"
                console.print(f"run {run.name} {outcome.status}: {outcome.message}{hint}", style="yellow")
                return STOPPED if outcome.status == "stopped" else FAILED
            run.update(trained=True)
        with signals_go_to(_interrupt):
            return _finish(run, recipe, dataset, tracker, workspace.address)
    except KeyboardInterrupt:
        run.update(status="stopped", message="interrupted")
        tracker.sync()
        console.print(f"\nstopped; `advtrain train --resume {run.name}` goes on", style="yellow")
        return STOPPED
    except Exception as error:
        with suppress(OSError):  # of a full disk: what went wrong first is what is told
            run.update(status="failed", message=str(error))
            tracker.sync()
        raise


def _train(
    run: RunFolder, recipe: Recipe, dataset: Dataset, tracker: Tracker, workspace: Workspace
) -> Outcome:
    with _stop_on_signal(run), tracker.system_metrics(), progress_view(run) as view:

        def tick() -> None:
            view.tick()
            tracker.tick()
            show_run(run, recipe.name)

        outcome = launch(recipe, dataset, run, address=workspace.address, tick=tick)
        tick()
    return outcome


@contextmanager
def _stop_on_signal(run: RunFolder) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to save and end; the second ends this process at once."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        run.request_stop()
        console.print("\nstopping: saving a checkpoint (once more to stop at once)", style="yellow")

    with signals_go_to(handle):
        yield


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def signals_go_to(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Let Ctrl-C, also of a job in the background, and SIGTERM call `handle` while inside."""
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(run: RunFolder, recipe: Recipe, dataset: Dataset, tracker: Tracker, address: str | None) -> int:
    """Evaluate on the test split, draw, register; each is done once, however often this is called."""
    report = judge_on_test(run, recipe, dataset, address)
    registered = None
    if tracker.sync():
        model = trained_model(run, recipe, dataset).load()
        registered = register(run, tracker, model, recipe, dataset, report)
        run.update(status="finished", message="", registered=registered.uri)
        tracker.sync()
    else:
        run.update(message="trained and evaluated; not registered yet: MLflow is away")
    show_run(run, recipe.name)
    _print_summary(run, report, registered, tracker)
    return 0


def judge_on_test(run: RunFolder, recipe: Recipe, dataset: Dataset, address: str | None) -> AnyReport:
    """Return the report on the run's best model on the test split, made on the first call."""
    source, judge = trained_model(run, recipe, dataset), recipe.evaluation
    if not (run.report / "report.json").exists():
        console.print("evaluating on the test split ...")
        with evaluation_view() as progress:
            found = evaluate(
                EvalSpec(
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
                ),
                workers=Workers(None if recipe.training.num_workers or ray_is_up() else 0, address),
                cache=run.evaluations,
                progress=progress,
            )
        draw_figures(source.load(), dataset, found.report, judge.threat_model, run.report, seed=judge.seed)
        found.save(run.report)  # last: a report that is there is whole
    return load_report(run.report)


def print_report(report: AnyReport, extra: list[list[str]]) -> None:
    """Print the clean figures and what stood after each attack, with 95 % intervals, and which checks did not pass."""
    table(report.title, ["", "value  [95 % interval]"], report.rows + extra)
    for check in report.checks if isinstance(report, Report) else []:
        if check.verdict in ("failed", "warning"):
            style = "red" if check.verdict == "failed" else "yellow"
            console.print(
                f"{check.verdict}: {check.question} {check.evidence}; {check.advice}",
                style=style,
                markup=False,
            )


def _print_summary(
    run: RunFolder, report: AnyReport, registered: Registered | None, tracker: Tracker
) -> None:
    extra = [["training time", duration(run.training_seconds())]]
    if registered is not None:
        alias = " (champion)" if registered.champion else ""
        extra.append(["registered", f"{registered.uri}{alias}"])
    print_report(report, extra)
    if registered is not None and not registered.champion:
        console.print(f"`advtrain promote {registered.name} --version {registered.version}` asks the gate")
    for record in run.recoveries():
        console.print(f"note: {describe_recovery(record)}", style="yellow")
    console.print(f"report: {shared_place(run.report / 'report.html')}")
    if registered is None:
        console.print(f"MLflow was away: `advtrain sync {run.name}` registers the model when it is back")
    print_where_to_look(tracker.state["uri"], tracker.state["experiment_id"], tracker.state["run_id"])


def print_where_to_look(uri: str, experiment_id: str, run_id: str) -> None:
    """Print the command or address under which MLflow shows a run."""
    if uri.startswith("sqlite"):
        # As it can be typed here: the environment that this ran in need not be the shell's.
        mlflow = (
            "mlflow" if shutil.which("mlflow") else os.path.relpath(Path(sys.executable).with_name("mlflow"))
        )
        console.print(f"look at it: {mlflow} ui --backend-store-uri {uri}")
    else:
        console.print(f"look at it: {uri}/#/experiments/{experiment_id}/runs/{run_id}")
