"""Printed results: reports, finished trainings, and how to open them in MLflow."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from advtrain.evaluation import AnyReport, Report
from advtrain.runs.storage import shared_place
from advtrain.training import describe_recovery
from pipelines.cli.console import console, table, write_json
from pipelines.train import TrainResult
from tuning.text import duration

#: Exit codes other than 0: 1 failed, 2 bad input, 130 stopped (as the shell reports Ctrl-C).
FAILED, STOPPED = 1, 130


def show_training(result: TrainResult, json_file: Path | None = None) -> int:
    """Print the result of a run; return the exit code."""
    run = result.run
    values = {
        "run": run.name,
        "folder": shared_place(run.path),
        "status": result.status,
        "message": result.message,
        "report": None if result.report is None else result.report.model_dump(mode="json"),
        "registered": None if result.registered is None else result.registered.uri,
        "champion": result.registered is not None and result.registered.champion,
    }
    write_json(json_file, values)
    if result.status == "nothing to do":
        where = f" (its report: {shared_place(run.report)})" if (run.report / "report.json").exists() else ""
        console.print(f"{result.message}{where}")
        return 0
    if result.report is None:
        hint = f"`advtrain train --resume {run.name}` resumes from the last checkpoint"
        console.print(f"run {run.name} {result.status}: {result.message}; {hint}", style="yellow")
        return STOPPED if result.status == "stopped" else FAILED
    registered, extra = result.registered, [["training time", duration(run.training_seconds())]]
    if registered is not None:
        extra.append(["registered", f"{registered.uri}{' (champion)' if registered.champion else ''}"])
    print_report(result.report, extra)
    if registered is not None and not registered.champion:
        console.print(
            f"`advtrain promote {registered.name} --version {registered.version}` tries to promote it"
        )
    for record in run.recoveries():
        console.print(f"note: {describe_recovery(record)}", style="yellow")
    console.print(f"report: {shared_place(run.report / 'report.html')}")
    if registered is None:
        console.print(
            f"not registered, because MLflow was unreachable: `advtrain sync {run.name}` registers it later"
        )
    if result.tracking is not None:
        print_where_to_look(**result.tracking)
    return 0 if registered is not None else FAILED


def print_report(report: AnyReport, extra: list[list[str]]) -> None:
    """Print a report: metrics with 95 % intervals, and the checks that did not pass."""
    table(report.title, ["", "value  [95 % interval]"], report.rows + extra)
    if report.features:
        table(f"{report.threat} in the units of the features", *report.units(20))
    for check in report.checks if isinstance(report, Report) else []:
        if check.verdict in ("failed", "warning"):
            style = "red" if check.verdict == "failed" else "yellow"
            console.print(
                f"{check.verdict}: {check.question} {check.evidence}; {check.advice}",
                style=style,
                markup=False,
            )


def print_where_to_look(uri: str, experiment_id: str, run_id: str) -> None:
    """Print the command or URL that opens a run in MLflow.

    Without `workflowType`, MLflow opens its pages for language models, where the switch is "Model training".
    """
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    if uri.startswith("sqlite"):
        # A relative path works even if the environment is not active in the user's shell.
        mlflow = (
            "mlflow" if shutil.which("mlflow") else os.path.relpath(Path(sys.executable).with_name("mlflow"))
        )
        console.print(f"look at it: {mlflow} ui --backend-store-uri {shlex.quote(uri)}")
        console.print(f"then open: http://127.0.0.1:5000{page}")
    else:
        console.print(f"look at it: {uri}{page}")
