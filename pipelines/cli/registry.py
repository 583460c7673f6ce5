"""Commands of the registry: promote, rollback, models, history, copy, dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.options import (
    POLICIES,
    AddressOption,
    DataRootOption,
    JsonOption,
    RunsOption,
    TrackingOption,
    build_workspace,
    shipped,
)

NameArgument = Annotated[str, typer.Argument(help="Name of a registered model.")]


@command
def promote(
    name: NameArgument,
    version: Annotated[
        str | None, typer.Option("--version", help="Of the model [default: the challenger, else the newest]")
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="Name of a shipped policy, or a YAML file.")
    ] = "default",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the gate finds, and change nothing.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="For the record.")] = "",
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate", help="Judge it anew with the policy's suite if its own report has a weaker one."
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=0, help="Ray workers where a model is judged anew; 0: in this process."
        ),
    ] = 0,
    json: JsonOption = None,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Ask the gate to make a version champion; refused, it exits with 1 and names each rule that failed."""
    from advtrain.promotion import load_policy
    from pipelines import promote as job
    from pipelines.cli.models import show_promotion

    chosen = load_policy(shipped(policy, POLICIES, "policy"))
    workspace = build_workspace(runs, tracking_uri, data_root, address)
    request = job.PromotionRequest(version, chosen, dry_run, reason, evaluate, workers)
    with reporting(json) as progress:
        result = job.promote(name, workspace, request, progress=progress)
    return show_promotion(result, json)


@command
def rollback(
    name: NameArgument,
    reason: Annotated[str, typer.Option("--reason", help="For the record.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="V", help="A former champion [default: the one before]")
    ] = None,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Make a former champion champion again."""
    from pipelines import promote as job
    from pipelines.cli.models import show_promotion

    workspace = build_workspace("runs", tracking_uri, None, None)
    with reporting(json) as progress:
        result = job.rollback(name, workspace, to=to, reason=reason, progress=progress)
    return show_promotion(result, json)


@command
def models(
    name: Annotated[
        str | None, typer.Argument(help="Name of a registered model.", show_default=False)
    ] = None,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """List the versions: aliases, figures, trust, who made them champion and when."""
    from pipelines import models as job
    from pipelines.cli.models import show_models

    workspace = build_workspace("runs", tracking_uri, None, None)
    with reporting(json) as progress:
        found = job.models(name, workspace, progress=progress)
    return show_models(found, workspace.tracking_uri, json)


@command
def history(
    name: NameArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only say whether the record is whole; exits with 1 if not.")
    ] = False,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Print every decision about a model, allowed or refused, with its evidence."""
    from pipelines import models as job
    from pipelines.cli.models import show_history

    workspace = build_workspace("runs", tracking_uri, None, None)
    with reporting(json) as progress:
        chain = job.history(name, workspace, repair=not verify, progress=progress)
    return show_history(name, chain, verify=verify, json_file=json)


@command
def copy(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="Registered model that it becomes a version of.")
    ],
    to_tracking_uri: Annotated[
        str | None, typer.Option("--to-tracking-uri", help="Another MLflow store [default: the same]")
    ] = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Copy a version with its evidence to another registry, as challenger: the gate there decides."""
    from advtrain.registry import copy as job
    from advtrain.tracking.store import tracking_uri as absolute
    from pipelines.cli.console import console

    target = None if to_tracking_uri is None else absolute(to_tracking_uri)
    made = job(model, absolute(tracking_uri), to, target)
    console.print(f"{made.uri}{' (champion)' if made.champion else ''}")
    return 0


@command
def dashboard(
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("dashboard.html"),
    mlflow_url: Annotated[
        str | None,
        typer.Option(
            "--mlflow-url", help="Where its links lead [default: the server, or http://127.0.0.1:5000]"
        ),
    ] = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Write a page with champions, challengers, trends and decisions, which needs no network."""
    from pipelines import models as job
    from pipelines.cli.console import console

    count = job.dashboard(build_workspace("runs", tracking_uri, None, None), out, mlflow_url)
    console.print(f"{out}: {count} models", markup=False)
    return 0
