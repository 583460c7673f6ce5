"""The command line: `advtrain COMMAND`, or `python -m pipelines COMMAND`. Those of the registry: registry_cli.py."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines import jobs_cli, registry_cli  # noqa: F401 (their commands)
from pipelines.cli import (
    CAMPAIGNS,
    RECIPES,
    STUDIES,
    AddressOption,
    AllowCodeOption,
    DataRootOption,
    OnceOption,
    RunsOption,
    SetOption,
    TrackingOption,
    app,
    build_workspace,
    command,
    shipped,
)

# Of a state dict that was made elsewhere.
ArchitectureOption = Annotated[
    str | None, typer.Option("--model", help="Of a state dict: a built-in model, or module:factory.")
]
ArgumentsOption = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Argument of --model.")
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", help="Of a state dict: means that its pixels are normalised with.")
]
StdOption = Annotated[str | None, typer.Option("--std", help="And standard deviations, as 0.2,0.2,0.2.")]


@command
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a shipped recipe, or a YAML file.", show_default=False)
    ] = None,
    set_: SetOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Ray Train workers; 0: in this process.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")
    ] = None,
    once: OnceOption = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Train, evaluate on the test split, and register."""
    from advtrain.errors import UserError
    from pipelines import train as job

    if recipe is None and resume is None:
        raise UserError("name a recipe (`advtrain recipes` lists them), or a run with --resume")
    if recipe is None and set_:
        raise UserError(
            "--set changes a recipe, and a resumed run keeps its own; name the recipe to start a new run"
        )
    workspace = build_workspace(runs, tracking_uri, data_root, address)
    overrides = list(set_ or [])
    if workers is not None and recipe is not None:
        overrides.append(f"training.num_workers={workers}")
    chosen = _load(recipe, overrides, allow_code) if recipe is not None else None
    if resume is not None:
        return job.resume(resume, workspace, expected=chosen, num_workers=workers)
    assert chosen is not None
    return job.train(chosen, workspace, allow_code=allow_code, once=once)


@command
def tune(
    campaign: Annotated[
        str | None, typer.Argument(help="Name of a shipped campaign, or a YAML file.", show_default=False)
    ] = None,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="NAME", help="Go on with this campaign, or extend it with --trials."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Trials in all.")] = None,
    wall: Annotated[
        str | None, typer.Option("--wall", metavar="TIME", help="Time in all, as 2h, 90m or 45s.")
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option("--prefer", metavar="NAME=VALUE", help="Pick along the Pareto front, as clean=0.98."),
    ] = None,
    once: OnceOption = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Search hyperparameters, then judge the winners on the test split and register them."""
    from advtrain.errors import UserError
    from pipelines import tune as job
    from tuning.campaign import load_campaign

    if (campaign is None) == (resume is None):
        raise UserError("name a campaign to start one, or one that was started with --resume; not both")
    if campaign is None and set_:
        raise UserError("--set changes the recipe of a campaign, and a resumed one keeps its own")
    workspace = build_workspace(runs, tracking_uri, data_root, address)
    budget = {"budget.trials": trials, "budget.wall": wall}
    changes = {path: value for path, value in budget.items() if value is not None}
    if resume is not None:
        return job.resume(resume, workspace, changes, prefer)
    assert campaign is not None
    plan = load_campaign(
        shipped(campaign, CAMPAIGNS, "campaign"),
        lambda name: shipped(name, RECIPES, "recipe"),
        set_ or [],
        changes,
        allow_code=allow_code,
    )
    return job.tune(plan, workspace, prefer, once)


@command
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/NAME@ALIAS, models:/NAME/VERSION, a run, a checkpoint, or a file: .pt2, or a state dict "
            "as .pt, .pth or .safetensors.",
        ),
    ],
    threat: Annotated[
        str | None,
        typer.Option("--threat", metavar="NORM:EPS", help="Judge under this instead, as linf:8/255."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Judge with quick, standard, autoattack, rand, or a list such as apgd-ce,apgd-t,square.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Judge on the test split of this data set instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first N test samples.")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="A stratified, seeded draw of N test samples.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model, sample by sample."),
    ] = None,
    transfer: Annotated[
        str | None,
        typer.Option("--transfer", metavar="MODEL", help="Also try what fools this model on the judged one."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Ray workers, one core or GPU each; 0: in this process.")
    ] = 0,
    architecture: ArchitectureOption = None,
    arguments: ArgumentsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Attack a model on a test split; what was done before, or before a kill, is not done again."""
    from pipelines.evaluate import Request, evaluate_model
    from pipelines.model_ref import ExternalModelSpec

    workspace = build_workspace(runs, tracking_uri, data_root, address)
    external = ExternalModelSpec(architecture, list(arguments or []), mean, std, allow_code)
    request = Request(threat, suite, data, limit, sample, transfer, workers)
    return evaluate_model(model, workspace, request, external, against=against, json=json)


@command
def compare(
    study: Annotated[str, typer.Argument(help="Name of a shipped study, or a YAML file.")],
    quick: Annotated[bool, typer.Option("--quick", help="Its quick form: minutes on two cores.")] = False,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Train methods, architectures and optimizers side by side, and write one report; goes on where it stopped."""
    from pipelines import compare as job
    from tuning.study.grid import load_study

    path = shipped(study, STUDIES, "study")
    workspace = build_workspace(runs, tracking_uri, data_root, address)
    return job.compare(load_study(path, quick=quick), workspace, quick=quick, allow_code=allow_code)


@command
def recipes() -> int:
    """List the shipped recipes."""
    from advtrain.recipe import load_recipe
    from pipelines.console import console

    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(path)
        facts = f"{recipe.model.name}, judged at {recipe.evaluation.threat_model}"
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
    from pipelines.console import console

    for path, value, description in _load(recipe, set_ or [], allow_code).leaves():
        shown = "null" if value is None else show_number(value) if isinstance(value, float) else value
        console.print(
            f"{path}: {str(shown).lower() if isinstance(value, bool) else shown}", end="", markup=False
        )
        console.print(f"  # {description}", style="dim", markup=False)
    return 0


@command
def sync(
    run: Annotated[str, typer.Argument(help="Name or folder of the run.")],
    runs: RunsOption = "runs",
    data_root: DataRootOption = None,
) -> int:
    """Send MLflow what it missed while it was away, and register the model if that is missing."""
    from pipelines import train as job

    return job.sync(run, build_workspace(runs, None, data_root, None))


@command
def doctor(
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Check versions, cores, GPUs, Ray, tracking store and data; say what to do about the rest."""
    from pipelines.doctor import check_all

    return check_all(build_workspace(runs, tracking_uri, data_root, address))


def _load(recipe: str, overrides: list[str], allow_code: bool):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from advtrain.recipe import load_recipe

    return load_recipe(shipped(recipe, RECIPES, "recipe"), overrides, allow_code=allow_code)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code; a user's error is one message, not a traceback."""
    from advtrain.errors import UserError

    sys.path.insert(0, "")  # your own code, as module:attribute, from the working folder
    try:
        app(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"'{error.filename}'" if error.filename else "a file"
        print(
            f"error: cannot write {where}: {error.strerror}; make room, then give the command again: a run "
            "goes on with --resume",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        if "advtrain.cluster" in sys.modules:
            sys.modules["advtrain.cluster"].stop_ray()


if __name__ == "__main__":
    main()
