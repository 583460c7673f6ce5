"""Commands for single trainings: train, sync, recipes, show, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.options import (
    RECIPES,
    AddressOption,
    AllowCodeOption,
    DataRootOption,
    JsonOption,
    OnceOption,
    RunsOption,
    SetOption,
    TrackingOption,
    build_workspace,
    shipped,
)


@command
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a shipped recipe, or a YAML file.", show_default=False)
    ] = None,
    set_: SetOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Ray Train workers; 0: in this process.")
    ] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Resume this run.")] = None,
    once: OnceOption = None,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Train a recipe, evaluate the model on the test split, and register it."""
    from advtrain.errors import UserError
    from pipelines import train as job
    from pipelines.cli.reports import show_training

    if recipe is None and resume is None:
        raise UserError("name a recipe (`advtrain recipes` lists them), or a run with --resume")
    workspace = build_workspace(runs, tracking_uri, data_root, address)
    overrides = list(set_ or [])
    if workers is not None and recipe is not None:
        overrides.append(f"training.num_workers={workers}")
    chosen = _load(recipe, overrides, allow_code) if recipe is not None else None
    with reporting(json) as progress:
        if resume is not None:
            result = job.resume(
                resume,
                workspace,
                expected=chosen,
                num_workers=workers,
                overrides=overrides if recipe is None else [],
                allow_code=allow_code,
                progress=progress,
            )
        else:
            assert chosen is not None
            result = job.train(chosen, workspace, allow_code=allow_code, once=once, progress=progress)
    return show_training(result, json)


@command
def sync(
    run: Annotated[str, typer.Argument(help="Name or folder of the run.")],
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    data_root: DataRootOption = None,
) -> int:
    """Send a run's pending records to MLflow, and register the model if that is missing."""
    from pipelines import train as job
    from pipelines.cli.reports import show_training

    with reporting() as progress:
        workspace = build_workspace(runs, None, data_root, None)
        result = job.sync(run, workspace, allow_code=allow_code, progress=progress)
    return show_training(result)


@command
def recipes() -> int:
    """List the shipped recipes."""
    from advtrain.recipe import load_recipe
    from pipelines.cli.console import console

    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(path)
        facts = f"{recipe.model.name}, evaluated at {recipe.evaluation.threat_model}"
        console.print(f"{path.stem:16} {recipe.description}\n{'':16} {facts}", markup=False)
    return 0


@command
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    set_: SetOption = None,
    allow_code: AllowCodeOption = False,
) -> int:
    """Print the resolved recipe: every path, its value, and what it means."""
    from advtrain.schema import show_number
    from pipelines.cli.console import console

    for path, value, description in _load(recipe, set_ or [], allow_code).leaves():
        shown = "null" if value is None else show_number(value) if isinstance(value, float) else value
        console.print(
            f"{path}: {str(shown).lower() if isinstance(value, bool) else shown}", end="", markup=False
        )
        console.print(f"  # {description}", style="dim", markup=False)
    return 0


@command
def doctor(
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Check versions, cores, GPUs, Ray, tracking store and data; say how to repair failures."""
    from pipelines.cli.console import console
    from pipelines.doctor import check_all

    failed, styles = False, {"ok": "green", "warn": "yellow", "FAIL": "red"}
    for check in check_all(build_workspace(runs, tracking_uri, data_root, address)):
        failed |= check.verdict == "FAIL"
        console.print(f"{check.verdict:5}", style=styles[check.verdict], end=" ")
        console.print(f"{check.name}: {check.message}", markup=False)
    return int(failed)


def _load(recipe: str, overrides: list[str], allow_code: bool):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from advtrain.recipe import load_recipe

    return load_recipe(shipped(recipe, RECIPES, "recipe"), overrides, allow_code=allow_code)
