"""Commands for data before a training: init, data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.options import (
    RECIPES,
    AddressOption,
    DataRootOption,
    JsonOption,
    SetOption,
    build_workspace,
    expand_path,
    shipped,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advtrain.data.summary import DataSummary


@command
def init(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Data: a folder of images, .npz, .csv, .parquet, or the name of a built-in data set.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; default: NAME.yaml in this folder.", callback=expand_path
        ),
    ] = None,
    set_: SetOption = None,
    json: JsonOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Write a first recipe for data, after a look at it."""
    from pipelines.cli.console import console, write_json
    from pipelines.data import radii
    from pipelines.init import draft, write

    with reporting(json):
        made = draft(target, build_workspace("runs", None, data_root, address), set_ or [])
    file = output or Path(f"{made.recipe.name}.yaml")
    write(made, file)
    write_json(
        json,
        {"file": str(file), "recipe": made.text, "reasons": made.reasons, "data": made.summary.to_json()},
    )
    show_data(made.summary, radii(made.recipe))
    console.print(f"\n{made.text}")
    command_line = ["advtrain", "train", str(file), *(["--data-root", data_root] if data_root else [])]
    console.print(f"written to {file}; train it with: {shlex.join(command_line)}")
    return 0


@command
def data(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PATH",
            help="A recipe, or data: a folder of images, .npz, .parquet, or the name of a built-in data set.",
        ),
    ],
    set_: SetOption = None,
    json: JsonOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Print what a data set holds: files, classes, splits, copies, and what looks wrong."""
    from advtrain.recipe import load_recipe
    from pipelines.cli.console import write_json
    from pipelines.data import radii, summarize

    workspace = build_workspace("runs", None, data_root, address)
    recipe = (RECIPES / f"{target}.yaml").is_file() and not Path(target).exists()
    with reporting(json):
        if recipe or target.endswith((".yaml", ".yml")):
            # Loading data runs no code, so a recipe may name code without permission here.
            chosen = load_recipe(shipped(target, RECIPES, "recipe"), set_ or [], allow_code=True)
            found, known = summarize(chosen, workspace), radii(chosen)
        else:
            found, known = summarize(target, workspace, set_ or []), {}
    write_json(json, found.to_json())
    show_data(found, known)
    return 0


def show_data(found: DataSummary, radii: Mapping[str, float]) -> None:
    """Print the summary of a data set; `radii` are those of its recipe, by name."""
    from advtrain.data.units import unit_table
    from advtrain.text import listed
    from pipelines.cli.console import console, table

    console.print(f"{found.title}  digest {found.digest[:12]}")
    values = "" if found.values is None else f", values {found.values[0]:g} to {found.values[1]:g}"
    console.print(f"samples of shape {found.shape}, {found.dtype}{values}")
    if found.found.files:
        console.print(f"{found.found.files:,} files read")
    for what, counts in (("sizes", found.found.sizes), ("modes", found.found.modes)):
        if counts:
            most = sorted(counts.items(), key=lambda item: -item[1])
            shown = listed([f"{name} ({count:,})" for name, count in most], 8)
            console.print(f"{what} of the stored images: {shown}")
    splits = list(found.samples)
    rows = [[name, *(f"{counts[split]:,}" for split in splits)] for name, counts in found.classes.items()]
    if found.targets:
        rows.append(["targets", *("{:g} to {:g}".format(*found.targets[split]) for split in splits)])
    total = ["all", *(f"{found.samples[split]:,}" for split in splits)]
    table("Samples", ["class" if found.classes else "", *splits], [*rows, total])
    if found.features:
        table("Features", *unit_table(found.features, radii, 40))
    copies = [f"{count:,} within {split}" for split, count in found.copies.within.items() if count]
    copies += [f"{count:,} {where}" for where, count in found.copies.across.items() if count]
    if not found.copies.searched:
        copies = ["not searched in streamed parquet files"]
    console.print(f"copies: {', '.join(copies) or 'none'}")
    for remark in found.remarks():
        console.print(f"warning: {remark}", style="yellow")
