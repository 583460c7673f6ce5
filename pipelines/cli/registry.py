"""Commands of the registry: promote, rollback, models, history, copy, dashboard, relocate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.completion import complete_yaml
from pipelines.cli.options import (
    POLICIES,
    AddressOption,
    DataRootOption,
    JsonOption,
    RunsOption,
    TrackingOption,
    build_workspace,
    expand_path,
    shipped,
)

NameArgument = Annotated[str, typer.Argument(help="Name of a registered model.")]


@command
def promote(
    name: NameArgument,
    version: Annotated[
        str | None, typer.Option("--version", help="Version [default: the challenger, else the newest]")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="Name of a shipped policy, or a YAML file.",
            autocompletion=complete_yaml(POLICIES),
        ),
    ] = "default",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the verdict of every rule, and change nothing.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Reason for the audit log.")] = "",
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate", help="Evaluate again with the policy's suite if its report has a weaker one."
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=0, help="Ray workers for repeating an evaluation; 0: evaluate in this process."
        ),
    ] = 0,
    json: JsonOption = None,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Promote a version to champion if every rule of the policy passes.

    If a rule fails, the command names it and exits with 1.
    """
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
    reason: Annotated[str, typer.Option("--reason", help="Reason for the audit log.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="V", help="Former champion [default: the previous one]")
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
    """List versions with aliases, metrics, trust, and who made them champion and when."""
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
        bool, typer.Option("--verify", help="Only verify the audit log; exits with 1 if it is damaged.")
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
        str, typer.Option("--to", metavar="NAME", help="Registered model that the copy becomes a version of.")
    ],
    to_tracking_uri: Annotated[
        str | None, typer.Option("--to-tracking-uri", help="MLflow store to copy to [default: the same]")
    ] = None,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Copy a version with its evidence to another model name or store, as challenger."""
    from advtrain.registry import copy as job
    from advtrain.tracking.store import tracking_uri as absolute
    from pipelines.cli.console import console, write_json

    target = None if to_tracking_uri is None else absolute(to_tracking_uri)
    with reporting(json):
        made = job(model, absolute(tracking_uri), to, target)
    write_json(json, {"model": made.uri, "champion": made.champion})
    console.print(f"{made.uri}{' (champion)' if made.champion else ''}")
    return 0


@command
def dashboard(
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.", callback=expand_path)] = Path(
        "dashboard.html"
    ),
    mlflow_url: Annotated[
        str | None,
        typer.Option(
            "--mlflow-url", help="MLflow URL for links [default: the server, or http://127.0.0.1:5000]"
        ),
    ] = None,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Write an HTML page with champions, challengers, trends and decisions; it works offline."""
    from pipelines import models as job
    from pipelines.cli.console import console, write_json

    with reporting(json):
        count = job.dashboard(build_workspace("runs", tracking_uri, None, None), out, mlflow_url)
    write_json(json, {"file": out, "models": count})
    console.print(f"{out}: {count} models")
    return 0


@command
def relocate(json: JsonOption = None, tracking_uri: TrackingOption = None) -> int:
    """Set the artifact paths of a SQLite store that was moved with its mlruns folder."""
    from advtrain.tracking.relocate import relocate as job
    from advtrain.tracking.store import tracking_uri as absolute
    from pipelines.cli.console import console, write_json

    with reporting(json):
        changed = job(absolute(tracking_uri))
    write_json(json, changed)
    for old, count in changed.items():
        console.print(f"{old}: {count} paths corrected")
    if not changed:
        console.print("every artifact path exists; nothing to do")
    return 0
