"""Checks and lock of a store's database before MLflow opens it.

MLflow retries for minutes if a database is unreachable, and it upgrades an older one that lacks a table.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, unquote

from advtrain.errors import UserError
from advtrain.runs.folder import file_lock, lock_folder

SQLITE = "sqlite:///"
#: Databases of MLflow, by the scheme of their URI.
_SERVERS = ("postgresql", "mysql", "mssql")


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other store."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))  # as SQLAlchemy reads it


def sqlite_uri(file: Path) -> str:
    """Return the URI of a SQLite file.

    Only characters with a meaning are quoted: for SQLAlchemy, and `$` for `tracking_uri`.
    """
    path = str(file)
    for character in "%?$":
        path = path.replace(character, quote(character))
    return f"{SQLITE}{path}"


def opening_lock(uri: str) -> AbstractContextManager[None]:
    """Lock a SQLite store while it is opened: concurrent creation of its tables would fail."""
    if sqlite_file(uri) is None:
        return nullcontext()
    lock = lock_folder() / f"store-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    return file_lock(lock, "another process has the store open", wait_s=120)


def check_database(uri: str) -> None:
    """Connect to a database once; do nothing for other stores and for a new SQLite file.

    Raises:
        UserError: its tables have the schema of another version of MLflow.
        Exception: it does not answer within ten seconds, or cannot be read or created.
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        return _check_folder(file)
    if file is None and uri.partition("://")[0].partition("+")[0] not in _SERVERS:
        return None
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # without it, a silent PostgreSQL server blocks
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    with create_engine(uri, poolclass=NullPool).connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return _check_schema(uri, found)


def _check_folder(file: Path) -> None:
    """Raise if the folder of a new SQLite file is not writable."""
    folder = next(parent for parent in file.parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} cannot be written")


def _check_schema(uri: str, found: str | None) -> None:
    """Raise a UserError if the tables are those of another version of MLflow; None: there are none."""
    latest, known = _schemas()
    if found in (None, latest):
        return
    version = metadata.version("mlflow")
    if found in known:
        raise UserError(
            f"the database '{uri}' has the schema of an older MLflow than {version} ({found}, now {latest}); back it "
            f"up and run `mlflow db upgrade {shlex.quote(uri)}`, or name another store with --tracking-uri"
        )
    raise UserError(
        f"the database '{uri}' has a schema that MLflow {version} does not know ({found}): a newer MLflow wrote it; "
        "install that version, or name another store with --tracking-uri"
    )


@cache
def _schemas() -> tuple[str | None, frozenset[str]]:
    """Return the schema revision of the installed MLflow, and all revisions that it knows."""
    import mlflow
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    place = Path(mlflow.__file__).parent / "store" / "db_migrations"
    config.set_main_option("script_location", str(place).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    return scripts.get_current_head(), frozenset(step.revision for step in scripts.walk_revisions())
