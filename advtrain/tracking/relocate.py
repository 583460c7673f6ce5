"""Correction of MLflow's absolute paths after a SQLite store was moved."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from advtrain.errors import UserError
from advtrain.tracking.database import sqlite_file
from advtrain.tracking.store import ARTIFACTS, artifact_location

#: Columns of MLflow's tables that hold the place of artifacts.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate(uri: str) -> dict[str, int]:
    """Set every artifact path of a moved store to the `mlruns` folder beside its file.

    All paths change in one transaction, or none does.

    Args:
        uri: URI of the SQLite store at its present place.

    Returns:
        The number of changed paths by the folder that they named before.

    Raises:
        UserError: it is no SQLite store, or there is no `mlruns` folder beside it.
    """
    file = sqlite_file(uri)
    if file is None or not file.is_file():
        raise UserError(
            f"'{uri}' is no SQLite store that exists; only such a store holds paths of this machine"
        )
    place = file.parent / ARTIFACTS
    if not place.is_dir():
        raise UserError(f"there is no folder '{place}': move {ARTIFACTS} to the folder of the store first")
    changed: dict[str, int] = {}
    with closing(sqlite3.connect(file, timeout=30)) as store, store:
        for old in _old_places(store, place):
            count = 0
            for table, column in _PLACES:
                below = f"WHERE substr({column} || '/', 1, ?) = ?"
                update = f"UPDATE {table} SET {column} = ? || substr({column}, ?) {below}"  # noqa: S608 (constants)
                values = (artifact_location(place), len(old) + 1, len(old) + 1, f"{old}/")
                count += store.execute(update, values).rowcount
            changed[old] = count
    return changed


def _old_places(store: sqlite3.Connection, place: Path) -> list[str]:
    """Return the folders of artifacts on this machine that are gone."""
    places = [str(row[0]) for row in store.execute("SELECT DISTINCT artifact_location FROM experiments")]
    ends = f"/{ARTIFACTS}"
    roots = {path.partition(ends)[0] + ends for path in places if ends in path}
    return sorted(
        root
        for root in roots
        if "://" not in root and unquote(root) != str(place) and not Path(unquote(root)).exists()
    )
