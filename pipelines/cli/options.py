"""Shared command-line options, shipped YAML files, and the workspace of a command."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advtrain.user_paths import expand, user_path
from pipelines.cli.completion import complete_yaml

# Torch, Ray and MLflow take seconds to import: each command imports what it needs when it runs.
if TYPE_CHECKING:
    from pipelines.workspace import Workspace

_SHIPPED = Path(__file__).parents[1]
RECIPES = _SHIPPED / "recipes"
STUDIES = _SHIPPED / "studies"
CAMPAIGNS = _SHIPPED / "campaigns"
POLICIES = _SHIPPED / "policies"


def expand_path(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Return the value of a path option or argument with `~` and `$VAR` expanded."""
    return None if value is None else user_path(value, param.opts[0])


RecipeArgument = Annotated[
    str,
    typer.Argument(help="Name of a shipped recipe, or a YAML file.", autocompletion=complete_yaml(RECIPES)),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override one setting of the recipe.")
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
    typer.Option("--once", metavar="KEY", help="Idempotency key: resume what it started, or start it."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the result as JSON to this file, or to standard output with -.",
        callback=expand_path,
    ),
]
AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Let the recipe name your own code as module:attribute.")
]

AllowDownloadOption = Annotated[
    bool,
    typer.Option(
        "--allow-download", help="Let networks, start weights and teachers of libraries be downloaded."
    ),
]

AllowLeakOption = Annotated[
    str | None,
    typer.Option(
        "--allow-leak",
        metavar="REASON",
        help="Train although an ancestor was trained on test samples; the model cannot be promoted.",
    ),
]


# Options for an external state dict.
ArchitectureOption = Annotated[
    str | None, typer.Option("--model", help="Model of a state dict: built-in, or module:factory.")
]
ArgumentsOption = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Argument of --model.")
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", help="Means that normalize a state dict's inputs, as 0.5,0.5,0.5.")
]
StdOption = Annotated[str | None, typer.Option("--std", help="Standard deviations, as 0.2,0.2,0.2.")]


def shipped(name: str, folder: Path, what: str) -> Path:
    """Return the shipped YAML file of that name, or the user's file at that path."""
    from advtrain.errors import UserError, nearest

    name = expand(name, what)
    ours = {path.stem: path for path in folder.glob("*.yaml")}
    if name in ours and not Path(name).is_file():
        return ours[name]
    if not Path(name).exists():
        beside = [str(path) for path in Path(name).parent.glob("*.y*ml")]
        if not name.endswith((".yaml", ".yml")):
            raise UserError(f"no {what} or YAML file '{name}'{nearest(name, [*ours, *beside])}")
        if close := difflib.get_close_matches(
            name, [*beside, *(f"{each}.yaml" for each in ours)], n=1, cutoff=0.8
        ):
            meant = close[0] if close[0] in beside else close[0].removesuffix(".yaml")
            raise UserError(
                f"cannot read the {what} '{name}': there is no such file; did you mean '{meant}'?"
            )
    return Path(name)


def build_workspace(
    runs: str,
    tracking_uri: str | None,
    data_root: str | None,
    address: str | None,
    allow_download: bool = False,
) -> Workspace:
    """Resolve options to absolute paths and URIs; mirror an object store to a local folder."""
    from advtrain.data import data_root as resolve
    from advtrain.runs.object_store import is_uri
    from advtrain.runs.storage import attach
    from advtrain.tracking.store import tracking_uri as absolute
    from pipelines.workspace import Workspace

    runs = expand(runs, "--runs")
    if is_uri(runs):
        mirror = attach(runs)
        mirror.fetch("*/run.json", "*/campaign.json")
        folder = mirror.folder
    else:
        folder = Path(runs).resolve()
    return Workspace(folder, absolute(tracking_uri), resolve(data_root), address, allow_download)
