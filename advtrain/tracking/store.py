"""Tracking store: its URI, client, experiments and errors."""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from advtrain.errors import UserError
from advtrain.runs.folder import file_lock, lock_folder
from advtrain.user_paths import expand

_SQLITE = "sqlite:///"
#: Folder of the artifacts beside the file of a SQLite store.
ARTIFACTS = "mlruns"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other store."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))  # as SQLAlchemy reads it


def sqlite_uri(file: Path) -> str:
    """Return the URI of a SQLite file.

    Only characters with a meaning are quoted: for SQLAlchemy, and `$` for `tracking_uri`.
    """
    path = str(file)
    for character in "%?$":
        path = path.replace(character, quote(character))
    return f"{_SQLITE}{path}"


def tracking_uri(given: str | None = None) -> str:
    """Return the tracking URI: the argument, else $MLFLOW_TRACKING_URI, else ./mlflow.db.

    The URI is absolute: Ray workers and later commands may have another working directory. It has no password: one that
    is given is moved to the environment of this process, so it is neither stored nor printed. In the path of a SQLite
    file, `~` and `$VAR` are expanded and %25 stands for a percent sign.

    Raises:
        UserError: it is no URI, has a password that cannot be moved, or names a variable that is not set.
    """
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if os.environ.get(name):
            os.environ[name] = _absolute(_without_password(os.environ[name]), f"${name}")
    uri = _without_password(given or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db")
    uri = _absolute(uri, "the tracking URI")
    if "://" not in uri:
        raise UserError(
            f"'{uri}' is not a tracking URI; write sqlite:///mlflow.db or http://HOST:PORT "
            "(MLflow's plain file store is deprecated)"
        )
    return uri


def _absolute(uri: str, what: str) -> str:
    """Return the URI of a SQLite file with its whole path; return any other URI unchanged."""
    if not uri.startswith(_SQLITE):
        return uri
    place, mark, query = uri.removeprefix(_SQLITE).partition("?")
    file = Path(unquote(expand(place, what)))
    return sqlite_uri(file if file.is_absolute() else file.resolve()) + mark + query


def has_password(uri: str) -> bool:
    """Return whether the URI of a server or database holds a password or token."""
    scheme, _, rest = uri.partition("://")
    if scheme.lower().startswith(("sqlite", "file")):  # a path may contain an @
        return False
    account = rest.rpartition("@")[0]
    if account and (":" in account or scheme.lower() in ("http", "https")):
        return True
    return re.search(r"(password|passwd|token|secret)[a-z_]*=", rest.lower()) is not None


def _without_password(uri: str) -> str:
    """Return the URI without its password, which goes to the variables that MLflow and libpq read."""
    if not has_password(uri):
        return uri
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if parts.password is None or scheme not in ("http", "https", "postgresql", "postgres"):
        raise UserError(
            f"the URI of the store at '{parts.hostname}' holds a password, which would be stored and shown; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD, and leave it out"
        )
    user, password = unquote(parts.username or ""), unquote(parts.password)
    host = parts.netloc.rpartition("@")[2]
    if scheme in ("http", "https"):
        _set_once({"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}, host)
        return urlunsplit(parts._replace(netloc=host))
    _set_once({"PGPASSWORD": password}, host)
    return urlunsplit(parts._replace(netloc=f"{quote(user)}@{host}"))


def _set_once(values: dict[str, str], host: str) -> None:
    """Set environment variables; raise a UserError if one has another value, for another store."""
    for name, value in values.items():
        if os.environ.get(name, value) != value:
            raise UserError(
                f"the URI of the store at '{host}' and ${name} differ; a command can use one account: leave one out"
            )
    os.environ.update(values)


def open_client(uri: str, registry_uri: str | None = None, *, must_exist: bool = False) -> Any:
    """Return an MlflowClient; create the store if it is a new SQLite file.

    Args:
        registry_uri: URI of the registry; default: $MLFLOW_REGISTRY_URI, else the same store.
        must_exist: raise if a SQLite file does not exist, for commands that only read a store.

    Raises:
        UserError: the store cannot be reached or written.
    """
    if must_exist and (file := sqlite_file(uri)) is not None and not file.is_file():
        raise UserError(f"there is no store '{uri}'; set --tracking-uri or $MLFLOW_TRACKING_URI")
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),  # unsent data is retried from the run folder
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        os.environ.setdefault(name, value)
    import mlflow

    if not logging.getLogger(__name__).isEnabledFor(logging.INFO):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    with store_errors(uri), _alone(uri):
        _check_folder(uri)
        _check_database(uri)
        mlflow.set_tracking_uri(uri)  # also sets the registry's, unless $MLFLOW_REGISTRY_URI does
        client = mlflow.MlflowClient(uri, registry_uri)
        client.search_experiments(max_results=1)
        _remove_quoted_folder(client, uri)
        return client


def _remove_quoted_folder(client: Any, uri: str) -> None:
    """Remove the empty folder that MLflow makes at the quoted path of a SQLite file."""
    file = sqlite_file(uri)
    quoted = Path(uri.removeprefix(_SQLITE).partition("?")[0])
    if file is not None and file.parent != quoted.parent:
        client.search_registered_models(max_results=1)  # the registry makes it, too, when it is opened
        with suppress(OSError):
            os.removedirs(quoted.parent)


def artifact_location(folder: Path) -> str:
    """Return a folder as MLflow stores it: a path that is read as a URI."""
    return str(folder).replace("%", "%25")


def _check_folder(uri: str) -> None:
    """Raise if the folder of a new SQLite file is not writable; MLflow retries for two minutes."""
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"the folder {folder} cannot be written")


def _check_database(uri: str) -> None:
    """Raise if a database server does not answer; MLflow retries for ten minutes."""
    ports = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
    parts = urlsplit(uri)
    port = parts.port or ports.get(parts.scheme.partition("+")[0])
    if parts.hostname and port and parts.scheme.partition("+")[0] in ports:
        socket.create_connection((parts.hostname, port), timeout=10).close()


def _alone(uri: str) -> AbstractContextManager[None]:
    """Lock a SQLite store while it is opened: concurrent creation of its tables would fail."""
    if sqlite_file(uri) is None:
        return nullcontext()
    lock = lock_folder() / f"store-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    return file_lock(lock, "another process has the store open", wait_s=120)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Convert errors of MLflow and SQLAlchemy about an unusable store into one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (requests, SQLAlchemy, sqlite3 and MLflow each raise their own)
        first = str(error).split("\n")[0][:200]
        raise UserError(
            f"the tracking store '{uri}' cannot be used: {first}; start the server, make the folder writable, "
            "or name another with --tracking-uri"
        ) from error


def user() -> str:
    """Return the name of the user that this process runs as.

    Variables such as $LOGNAME do not change it.
    """
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a user id without a name
        return str(os.getuid())


def actor(uri: str) -> str:
    """Return who acts on a store: the account at the server, else the user of this process."""
    account = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return account if account and uri.startswith("http") else user()


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Record CPU, memory, disk, network and GPU use of this machine while inside."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=2, samples_before_logging=2, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def find_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment; create it if it does not exist.

    Raises:
        UserError: the store was moved, and MLflow would write its artifacts to the old place.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return _create_experiment(client, uri, name)
    file, place = sqlite_file(uri), Path(unquote(found.artifact_location))
    if file is not None and place.is_absolute() and not place.exists() and (file.parent / ARTIFACTS).exists():
        raise UserError(
            f"the artifacts of experiment '{name}' were in '{place}', which is gone: the store was moved; run "
            "`advtrain relocate` in its folder"
        )
    return str(found.experiment_id)


def present_uri(uri: str, now: str) -> str:
    """Return where a store is that may have been moved with its folder.

    Args:
        uri: URI that a run has recorded.
        now: URI of the store that the command uses.

    Raises:
        UserError: it is a SQLite store that is gone, and `now` is not that file. A new store is never made for a run
            that exists.
    """
    before, here = sqlite_file(uri), sqlite_file(now)
    if before is None or before.is_file():
        return uri
    if here is not None and here.is_file() and here.name == before.name:
        return now
    raise UserError(
        f"the tracking store of the run was '{before}', which is gone; name its present place with --tracking-uri"
    )


def _create_experiment(client: Any, uri: str, name: str) -> str:
    """Create an experiment; for a SQLite store, its artifacts go next to the file."""
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    place = artifact_location(file.parent / ARTIFACTS) if file is not None else None
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:  # another process created it in the meantime
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
