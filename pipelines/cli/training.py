"""Commands for single trainings: train, sync, recipes, show, doctor."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.completion import complete_runs, complete_yaml
from pipelines.cli.options import (
    RECIPES,
    AddressOption,
    AllowCodeOption,
    AllowDownloadOption,
    AllowLeakOption,
    DataRootOption,
    JsonOption,
    OnceOption,
    RecipeArgument,
    RunsOption,
    SetOption,
    TrackingOption,
    build_workspace,
    shipped,
)

if TYPE_CHECKING:
    from advtrain.recipe import Recipe


WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=0, help="Ray Train workers; 0: in this process.")
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume", metavar="RUN", help="Resume this run.", autocompletion=complete_runs("run.json")
    ),
]


@command
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a shipped recipe, or a YAML file.",
            show_default=False,
            autocompletion=complete_yaml(RECIPES),
        ),
    ] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    resume: ResumeOption = None,
    once: OnceOption = None,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    allow_download: AllowDownloadOption = False,
    allow_leak: AllowLeakOption = None,
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
    if resume is not None and allow_leak is not None:
        raise UserError("--allow-leak is for a new run; a resumed run keeps what it was started with")
    workspace = build_workspace(runs, tracking_uri, data_root, address, allow_download)
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
            result = job.train(
                chosen,
                workspace,
                allow_code=allow_code,
                allow_leak=allow_leak,
                once=once,
                progress=progress,
            )
    return show_training(result, json)


@command
def sync(
    run: Annotated[
        str, typer.Argument(help="Name or folder of the run.", autocompletion=complete_runs("run.json"))
    ],
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    data_root: DataRootOption = None,
) -> int:
    """Send a run's pending records to MLflow, and register the model if that is missing."""
    from pipelines import train as job
    from pipelines.cli.reports import show_training

    with reporting(json) as progress:
        workspace = build_workspace(runs, None, data_root, None)
        result = job.sync(run, workspace, allow_code=allow_code, progress=progress)
    return show_training(result, json)


@command
def recipes(json: JsonOption = None) -> int:
    """List the shipped recipes."""
    from advtrain.recipe import load_recipe
    from advtrain.recipe.edits import is_edited
    from advtrain.schema import show_number
    from pipelines.cli.console import console, write_json

    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        loaded = load_recipe(path)
        threat = loaded.evaluation.threat
        found.append(
            {
                "recipe": path.stem,
                "description": loaded.description,
                "model": loaded.model.name,
                "threat": str(threat) if is_edited(threat) else f"{threat.norm}:{show_number(threat.eps)}",
            }
        )
    with reporting(json):
        write_json(json, found)
    for each in found:
        facts = f"{each['model']}, evaluated at {each['threat']}"
        console.print(f"{each['recipe']:16} {each['description']}\n{'':16} {facts}")
    return 0


@command
def show(
    recipe: RecipeArgument,
    set_: SetOption = None,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    data_root: DataRootOption = None,
) -> int:
    """Print the resolved recipe: every path, its value, and what it means.

    For a table that can be read, the radii are also printed in the units of its features.
    """
    from advtrain.schema import show_number
    from pipelines.cli.console import console, write_json

    loaded = _load(recipe, set_ or [], allow_code)
    leaves = list(loaded.leaves())
    with reporting(json):
        write_json(json, [{"path": path, "value": value, "meaning": text} for path, value, text in leaves])
    for path, value, description in leaves:
        shown = "null" if value is None else show_number(value) if isinstance(value, float) else value
        console.print(f"{path}: {str(shown).lower() if isinstance(value, bool) else shown}", end="")
        console.print(f"  # {description}", style="dim")
    _show_radii(loaded, data_root)
    return 0


def _show_radii(recipe: Recipe, data_root: str | None) -> None:
    """Print the radii of a recipe in the units of its table's features."""
    from advtrain.recipe.data import TABLE_FILES

    if recipe.data.source not in TABLE_FILES:
        return
    from advtrain.data.units import unit_note, unit_table
    from advtrain.errors import UserError
    from pipelines.cli.console import console, table
    from pipelines.data import radii, table_features

    known = radii(recipe)
    try:
        features = table_features(recipe, build_workspace("runs", None, data_root, None)) if known else []
    except UserError as error:
        console.print(f"radii in the units of the features are not shown: {error}", style="yellow")
        return
    if features:
        table("Radii in the units of the features", *unit_table(features, known, 40))
        console.print(unit_note(recipe.evaluation.threat.norm))


@command
def doctor(
    json: JsonOption = None,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Check versions, cores, GPUs, Ray, tracking store and data; say how to repair failures."""
    from rich.text import Text

    from advtrain.text import printable
    from pipelines.cli.console import console, write_json
    from pipelines.doctor import check_all

    found, styles = [], {"ok": "green", "warn": "yellow", "FAIL": "red"}
    with reporting(json):
        for check in check_all(build_workspace(runs, tracking_uri, data_root, address)):
            found.append(check)
            verdict = (f"{check.verdict:5} ", styles[check.verdict])
            console.print(Text.assemble(verdict, printable(f"{check.name}: {check.message}")))
    write_json(json, [asdict(check) for check in found])
    return int(any(check.verdict == "FAIL" for check in found))


def _load(recipe: str, overrides: list[str], allow_code: bool) -> Recipe:
    from advtrain.recipe import load_recipe

    return load_recipe(shipped(recipe, RECIPES, "recipe"), overrides, allow_code=allow_code)
