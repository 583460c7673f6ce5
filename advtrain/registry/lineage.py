"""Lineage of a version: `rows/` beside its model, with its ancestors and records of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advtrain.data import Dataset
from advtrain.documents import dump_json, read_record, read_yaml
from advtrain.errors import UserError
from advtrain.recipe import Recipe
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage, add_record, records_in, write_rows
from advtrain.schema import with_present_names

#: Folder of artifacts, and its file with the ancestors.
ROWS, FILE = "rows", "lineage.json"
#: Role of an ancestor -> section and key of the recipe that name it.
_SETTINGS = {"start": ("model", "from"), "teacher": ("objective", "teacher")}


def log_lineage(client: Any, run_id: str, run: RunFolder, dataset: Dataset) -> Lineage:
    """Log the ancestors of a run, and the records of its samples and of theirs; return them."""
    write_rows(run.rows, dataset)  # trials have none of their own
    lineage = Lineage.of_run(run)
    for digest, record in lineage.records.items():
        add_record(run.rows, record)  # some are in the folder of a campaign
        client.log_artifact(run_id, str(run.rows / f"{digest}.rows"), ROWS)
    client.log_text(run_id, dump_json(lineage.as_json(), 1), f"{ROWS}/{FILE}")
    return lineage


def read_lineage(folder: Path) -> Lineage:
    """Read the lineage of a version from its downloaded files.

    Versions of earlier releases have neither ancestors nor records.

    Raises:
        UserError: a file is damaged.
    """
    path, recipe = folder / ROWS / FILE, folder / "recipe.yaml"
    try:
        facts = read_record(path, "data_digest", "ancestors") if path.exists() else {"data_digest": ""}
        lineage = Lineage.from_json(facts, records_in(folder / ROWS))
    except (OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"'{ROWS}/{FILE}' of the version is damaged: {error}") from error
    values = with_present_names(read_yaml(recipe, "recipe"), Recipe) if recipe.exists() else {}
    sections = values if isinstance(values, dict) else {}
    named = {
        role: f"{section}.{key}"
        for role, (section, key) in _SETTINGS.items()
        if isinstance(found := sections.get(section), dict) and found.get(key) is not None
    }
    roles = {ancestor.role for ancestor in lineage.ancestors}
    unrecorded = tuple(setting for role, setting in named.items() if role not in roles)
    return Lineage(lineage.data_digest, lineage.ancestors, lineage.records, lineage.allowed_leak, unrecorded)
