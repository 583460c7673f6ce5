"""What every command shares: the application, options, shipped files, workspace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from advtrain.environment import tune_malloc

# Torch, Ray and MLflow take seconds to import: each command imports what it needs when it runs.
if TYPE_CHECKING:
    from pipelines.train import Workspace

RECIPES = Path(__file__).parent / "recipes"
STUDIES = Path(__file__).parent / "studies"
CAMPAIGNS = Path(__file__).parent / "campaigns"
POLICIES = Path(__file__).parent / "policies"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adversarial training: recipe -> run -> report -> registered model.",
)

Job = TypeVar("Job", bound=Callable[..., int])


def command(job: Job) -> Job:
    """Add a command whose result is the exit code."""

    @app.command()
    @functools.wraps(job)
    def run(*args: object, **kwargs: object) -> None:
        code = None
        tune_malloc()
        try:
            code = job(*args, **kwargs)
        finally:  # sends what an object store does not have yet
            problems = storage.detach_all() if (storage := sys.modules.get("advtrain.runs.storage")) else []
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1 if problems and code == 0 else code)

    return job


SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a path of the recipe.")
]
RunsOption = Annotated[
    str,
    typer.Option("--runs", help="Folder of the run folders, or s3://BUCKET/FOLDER.", envvar="ADVTRAIN_RUNS"),
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow store [default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db]"
    ),
]
DataRootOption = Annotated[
    str | None,
    typer.Option("--data-root", help="Folder of the data [default: $ADVTRAIN_DATA_ROOT or ./data]"),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster [default: $RAY_ADDRESS, or a local one]")
]
OnceOption = Annotated[
    str | None,
    typer.Option("--once", metavar="KEY", help="Go on with what was started under this key, or start it."),
]
AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Let the recipe name your own code as module:attribute.")
]


def shipped(name: str, folder: Path, what: str) -> Path:
    """Return the shipped YAML file of that name, or the user's file at that path."""
    from advtrain.errors import UserError, nearest

    ours = {path.stem: path for path in folder.glob("*.yaml")}
    if name in ours and not Path(name).is_file():
        return ours[name]
    if not Path(name).exists() and not name.endswith((".yaml", ".yml")):
        raise UserError(f"no {what} or YAML file '{name}'{nearest(name, ours)}")
    return Path(name)


def build_workspace(
    runs: str, tracking_uri: str | None, data_root: str | None, address: str | None
) -> Workspace:
    """Resolve where things lie: absolute paths and URIs; runs in an object store get a folder here."""
    from advtrain.data import data_root as resolve
    from advtrain.runs.object_store import is_uri
    from advtrain.runs.storage import attach
    from advtrain.tracking.store import tracking_uri as absolute
    from pipelines.train import Workspace

    if is_uri(runs):
        mirror = attach(runs)
        mirror.fetch("*/run.json", "*/campaign.json")
        folder = mirror.folder
    else:
        folder = Path(runs).resolve()
    return Workspace(folder, absolute(tracking_uri), resolve(data_root), address)
