"""Tracking store: its URI, client, experiments and errors."""

from __future__ import annotations

import logging
import os
import pwd
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from advtrain.environment import warn_after
from advtrain.errors import UserError
from advtrain.tracking.database import SQLITE, check_database, opening_lock, sqlite_file, sqlite_uri
from advtrain.user_paths import expand

logger = logging.getLogger(__name__)

#: Folder of the artifacts beside the file of a SQLite store.
ARTIFACTS = "mlruns"
#: Status of a run -> MLflow status.
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
TRACKING_URI, REGISTRY_URI = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
#: Variables of MLflow that do not apply to runs of advtrain, and what does.
_UNUSED = {
    "MLFLOW_RUN_ID": "each training gets an MLflow run of its own",
    "MLFLOW_EXPERIMENT_NAME": "the recipe's name is the experiment",
    "MLFLOW_EXPERIMENT_ID": "the recipe's name is the experiment",
}
#: Variables that MLflow reads at each request, unless the environment sets them.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # unsent data is retried from the run folder
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
#: The same for the first request of a command, which is to fail within a minute.
_FIRST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def tracking_uri(given: str | None = None) -> str:
    """Return the tracking URI: the argument, else $MLFLOW_TRACKING_URI, else ./mlflow.db.

    The URI is absolute: Ray workers and later commands may have another working directory. It has no password: one that
    is given is moved to the environment of this process, so it is neither stored nor printed. In the path of a SQLite
    file, `~` and `$VAR` are expanded and %25 stands for a percent sign.

    Raises:
        UserError: it is no URI, names a file store or a variable that is not set, or has a password that cannot be
            moved.
    """
    for name in (TRACKING_URI, REGISTRY_URI):
        if os.environ.get(name):
            os.environ[name] = _without_password(os.environ[name])
    if os.environ.get(REGISTRY_URI):
        os.environ[REGISTRY_URI] = _absolute(os.environ[REGISTRY_URI], f"${REGISTRY_URI}")
    if given:
        return _absolute(_without_password(given), "the tracking URI")
    return _absolute(os.environ.get(TRACKING_URI) or f"{SQLITE}mlflow.db", f"${TRACKING_URI}")


def _absolute(uri: str, what: str) -> str:
    """Return the URI of a store with an absolute path; raise a UserError if it names a file store."""
    uri = re.sub(r"^sqlite\+pysqlite:", "sqlite:", uri)
    if uri.startswith(SQLITE):
        place, mark, query = uri.removeprefix(SQLITE).partition("?")
        file = Path(unquote(expand(place, what)))
        return sqlite_uri(file if file.is_absolute() else file.resolve()) + mark + query
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"{what} is '{uri}', which is no database and no server; write sqlite:///mlflow.db or http://HOST:PORT "
            "(MLflow no longer develops its file store; `mlflow migrate-filestore` copies it to a database)"
        )
    return uri


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


def open_client(
    uri: str,
    registry_uri: str | None = None,
    *,
    must_exist: bool = False,
    announce: bool = True,
    with_registry: bool = True,
) -> Any:
    """Return an MlflowClient; create the store if it is a new SQLite file.

    advtrain stops waiting for a server after at most a minute, and logs its name after three seconds.

    Args:
        registry_uri: URI of the registry; default: $MLFLOW_REGISTRY_URI, else the same store.
        must_exist: raise if a SQLite file does not exist, for commands that only read a store.
        announce: whether to log that the store does not answer; not for calls that are repeated.
        with_registry: whether to check the registry; not for calls that only write runs.

    Raises:
        UserError: the store or the registry cannot be reached or written, or belongs to another version of MLflow.
    """
    if must_exist and (file := sqlite_file(uri)) is not None and not file.is_file():
        raise UserError(f"there is no store '{uri}'; set --tracking-uri or ${TRACKING_URI}")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    if not logger.isEnabledFor(logging.INFO):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    with _opening(uri, announce):
        with _unchanged(TRACKING_URI):  # MLflow sets it, and a later call would take it for the user's
            mlflow.set_tracking_uri(uri)  # also sets the registry's, unless $MLFLOW_REGISTRY_URI does
        client = mlflow.MlflowClient(uri, registry_uri)
        client.search_experiments(max_results=1)
        _remove_quoted_folder(client, uri)
    if with_registry:
        check_registry(client, uri, registry_uri)
    return client


def check_registry(client: Any, uri: str, registry_uri: str | None = None) -> None:
    """Raise a UserError if the registry cannot be used; do nothing if it is the store `uri`."""
    import mlflow

    registry_uri = registry_uri or mlflow.get_registry_uri()
    if registry_uri != uri:
        with _opening(registry_uri, True, "registry"):
            client.search_registered_models(max_results=1)


def _remove_quoted_folder(client: Any, uri: str) -> None:
    """Remove the empty folder that MLflow makes at the quoted path of a SQLite file."""
    file = sqlite_file(uri)
    quoted = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if file is not None and file.parent != quoted.parent:
        client.search_registered_models(max_results=1)  # the registry makes it, too, when it is opened
        with suppress(OSError):
            os.removedirs(quoted.parent)


def artifact_location(folder: Path) -> str:
    """Return a folder as MLflow stores it: a path that is read as a URI."""
    return str(folder).replace("%", "%25")


@contextmanager
def _opening(uri: str, announce: bool, what: str = "tracking store") -> Iterator[None]:
    """Lock and check a store for its first request, which has short timeouts."""
    file = sqlite_file(uri)
    seconds, doing = (10, "creating") if file is not None and not file.exists() else (3, "waiting for")
    waiting = warn_after(seconds, f"{doing} the {what} '{uri}'") if announce else nullcontext()
    ours = [name for name in _FIRST if os.environ.get(name) == _DEFAULTS[name]]
    with store_errors(uri, what), waiting, opening_lock(uri), _unchanged(*ours):
        os.environ.update({name: _FIRST[name] for name in ours})
        check_database(uri)
        yield


@contextmanager
def _unchanged(*names: str) -> Iterator[None]:
    """Set environment variables back at the end of the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def store_errors(uri: str, what: str = "tracking store") -> Iterator[None]:
    """Convert errors of MLflow and SQLAlchemy about an unusable store into one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        option = "--tracking-uri" if what == "tracking store" else f"${REGISTRY_URI}"
        raise UserError(
            f"the {what} '{uri}' cannot be used: {reason_of(error)}; start the server, make the folder writable, "
            f"or name another with {option}"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, of a UserError's cause, or of a connection error."""
    from requests import RequestException

    if isinstance(error, UserError):
        error = error.__cause__ or error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RequestException):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        error = getattr(cause.args[0] if cause.args else None, "reason", None) or cause
    return str(error).split("\n")[0][:300]


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


def check_store(uri: str, *experiments: str) -> None:
    """Open a store before anything is written, and create the experiments that do not exist.

    Raises:
        UserError: the store, the registry or an experiment cannot be used.
    """
    for name in _UNUSED:
        value = os.environ.get(name)
        is_named = name == "MLFLOW_EXPERIMENT_NAME" and set(experiments) == {value}
        if value and not is_named:
            _warn_unused(name)
    client = open_client(uri)
    with store_errors(uri):
        for experiment in dict.fromkeys(experiments):
            find_experiment(client, uri, experiment)


@cache
def _warn_unused(name: str) -> None:
    """Log that a variable is not used, once in this process."""
    logger.warning("$%s is set and not used: %s", name, _UNUSED[name])


def find_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment; create it if it does not exist.

    Raises:
        UserError: the experiment was deleted, or the store was moved and MLflow would write its artifacts to the old
            place.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return _create_experiment(client, uri, name)
    if found.lifecycle_stage != "active":
        quoted = shlex.quote(uri)
        raise UserError(
            f"the experiment '{name}' was deleted in MLflow; restore it with `MLFLOW_TRACKING_URI={quoted} mlflow "
            f"experiments restore --experiment-id {found.experiment_id}`, or choose "
            "another name, for a recipe with --set name=NAME"
        )
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
