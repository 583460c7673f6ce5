"""Completions of arguments in the shell; they import no torch, Ray or MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import typer

from advtrain.errors import UserError
from advtrain.user_paths import user_path

Completion = Callable[[typer.Context, str], list[tuple[str, str]]]


def complete_yaml(folder: Path) -> Completion:
    """Return a completion by shipped YAML files and those in the working folder."""

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        shipped = [(path.stem, _description(path)) for path in sorted(folder.glob("*.yaml"))]
        own = [(path.name, "") for path in sorted(Path().glob("*.y*ml"))]
        return [item for item in shipped + own if item[0].startswith(incomplete)]

    return complete


def complete_runs(kind: str) -> Completion:
    """Return a completion by the names in the run folder whose record is called `kind`."""

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        given = ctx.params.get("runs") or os.environ.get("ADVTRAIN_RUNS") or "runs"
        try:
            folder = user_path(given, "--runs")
        except UserError:
            return []
        names = sorted(path.parent.name for path in folder.glob(f"*/{kind}"))
        return [(name, "") for name in names if name.startswith(incomplete)]

    return complete


def _description(path: Path) -> str:
    """Return the line `description` of a YAML file without parsing the file."""
    found = re.search(r"^description: *(.*)$", path.read_text(), re.M)
    return found[1].strip("\"'") if found else ""
