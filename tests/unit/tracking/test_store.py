"""Stores as users have them: deleted experiments, other versions, silent servers, variables of MLflow."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator

import mlflow
import pytest

from advtrain.errors import UserError
from advtrain.registry.export import log_archive
from advtrain.runs.folder import RunFolder
from advtrain.runs.lineage import Ancestor, named_in_tag
from advtrain.tracking import store as store_module
from advtrain.tracking.parent_run import ParentRun
from advtrain.tracking.store import check_store, find_experiment, open_client, reason_of, tracking_uri
from advtrain.tracking.tracker import Tracker
from pipelines.workspace import first_facts
from tests.kit import digits_data, digits_recipe, unset
from tests.registry_kit import TenClasses

VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_EXPERIMENT_ID",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    unset(monkeypatch, *VARIABLES)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Port of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        yield int(server.getsockname()[1])


def test_commands_in_errors_quote_the_store(tmp_path, store):
    file = shutil.copy(tmp_path / "mlflow.db", tmp_path / "my runs.db")
    uri = f"sqlite:///{file}"
    client = open_client(uri)
    client.delete_experiment(find_experiment(client, uri, "gone"))
    with pytest.raises(UserError, match=f"`MLFLOW_TRACKING_URI='{uri}' mlflow experiments restore"):
        check_store(uri, "gone")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = '75868b020152'")
    with pytest.raises(UserError, match=f"`mlflow db upgrade '{uri}'`"):
        open_client(uri)


def test_deleted_experiment_is_refused_with_command_that_restores_it(store):
    client = open_client(store)
    number = find_experiment(client, store, "gone")
    client.delete_experiment(number)
    with pytest.raises(
        UserError, match=f"mlflow experiments restore --experiment-id {number}.*--set name=NAME"
    ):
        check_store(store, "gone")
    client.restore_experiment(number)
    check_store(store, "gone")


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("75868b020152", r"schema of an older MLflow.*mlflow db upgrade sqlite:///.*mlflow\.db`"),
        ("f" * 12, "does not know .*: a newer MLflow wrote it"),
    ],
)
@pytest.mark.parametrize("which", ["tracking store", "registry"])
def test_database_of_another_mlflow_version_is_refused(
    store, tmp_path, monkeypatch, which, revision, message
):
    other = shutil.copy(tmp_path / "mlflow.db", tmp_path / "runs.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    uri = store
    if which == "registry":
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", store)
        uri = f"sqlite:///{other}"
    with pytest.raises(UserError, match=message):
        open_client(uri)


@pytest.mark.parametrize("given", ["file:///tmp/mlruns", "file:mlruns", "mlruns", "/tmp/mlruns"])
@pytest.mark.parametrize("name", [None, "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
def test_file_store_is_refused(given, name, monkeypatch):
    if name is not None:
        monkeypatch.setenv(name, given)
    with pytest.raises(UserError, match=f"{name or 'the tracking URI'} is '{given}'.*sqlite:///mlflow.db"):
        tracking_uri(given if name is None else None)


def test_uri_of_a_file_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///registry.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ["MLFLOW_REGISTRY_URI"] == f"sqlite:///{tmp_path}/registry.db"
    assert tracking_uri("sqlite+pysqlite:///a.db") == f"sqlite:///{tmp_path}/a.db"


def test_opened_store_is_not_the_default_of_later_calls(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_client(store)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert tracking_uri() == f"sqlite:///{tmp_path}/other/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    open_client(store)
    assert tracking_uri() == "http://host:5000"


@pytest.mark.parametrize("kind", ["http", "postgresql"])
def test_silent_server_ends_with_an_error(kind, silent_port, monkeypatch):
    first = {name: int(value) for name, value in store_module._FIRST.items()}
    longest = (first["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] + 1) * first["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert longest <= 40  # the start of a command and the pauses come on top
    for name in store_module._DEFAULTS:
        monkeypatch.setenv(name, store_module._DEFAULTS[name])
    monkeypatch.setattr(store_module, "_FIRST", dict.fromkeys(first, "1") | {list(first)[0]: "0"})
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be used: .*(Read timed out|timeout expired)"):
        open_client(f"{kind}://127.0.0.1:{silent_port}/x")
    assert time.monotonic() - started < 10
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"


def test_waiting_for_a_store_is_logged(silent_port, monkeypatch):
    seen = []
    monkeypatch.setattr(
        store_module, "warn_after", lambda *given: seen.append(given) or store_module.nullcontext()
    )
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    with pytest.raises(UserError):
        open_client(f"postgresql://127.0.0.1:{silent_port}/x")
    assert seen == [(3, f"waiting for the tracking store 'postgresql://127.0.0.1:{silent_port}/x'")]


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (OSError("Read timed out\nby host"), "Read timed out"),
        (None, "the tracking store 'u' is locked; wait"),
    ],
)
def test_reason_of_a_user_error_is_its_cause(cause, reason):
    error = UserError("the tracking store 'u' is locked; wait")
    error.__cause__ = cause
    assert reason_of(error) == reason


def test_reason_of_an_unusable_store_has_no_remedy(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    with pytest.raises(UserError) as caught:
        open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert "--tracking-uri" in str(caught.value)
    assert reason_of(caught.value) == "(sqlite3.DatabaseError) file is not a database"


def test_metrics_are_sent_although_the_registry_is_down(store, tmp_path, monkeypatch, caplog):
    (tmp_path / "registry.db").write_text("no database" * 100)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.db")
    recipe = digits_recipe()
    run = RunFolder.create(
        tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), first_facts(recipe, digits_data())
    )
    tracker = Tracker.start(run, recipe, digits_data(), store)
    assert Tracker.reopen(run, store).sync()
    parent = ParentRun.start(store, recipe.name, "study", {})
    parent.log({"best_robust_accuracy": 0.5}, 1)
    with caplog.at_level(logging.WARNING):
        assert not tracker.can_register()
    assert "the registry" in caplog.text
    with pytest.raises(UserError, match="the registry .* cannot be used: .*MLFLOW_REGISTRY_URI"):
        check_store(store, "mine")


def test_ancestors_are_a_tag_and_their_data_an_input(store, tmp_path):
    recipe = digits_recipe()
    parent = Ancestor("start", "models:/mnist/3", "a" * 64, "mnist-1", "b" * 64)
    facts = first_facts(recipe, digits_data()) | {"ancestors": [parent.as_json()]}
    run = RunFolder.create(tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), facts)
    tracker = Tracker.start(run, recipe, digits_data(), store)
    stored = open_client(store).get_run(tracker.state["run_id"])
    (named,) = named_in_tag(stored.data.tags["advtrain.ancestors"])
    assert (named.reference, named.digest) == ("models:/mnist/3", "a" * 64)
    found = {each.tags[0].value: each.dataset for each in stored.inputs.dataset_inputs}
    assert set(found) == {"train", "validation", "test", "start"}
    assert (found["start"].name, found["start"].digest) == ("data of models:/mnist/3", "b" * 36)


@pytest.mark.parametrize("name", VARIABLES[2:])
def test_variable_of_a_surrounding_run_is_not_used_and_named(name, store, monkeypatch, caplog):
    store_module._warn_unused.cache_clear()
    monkeypatch.setenv(name, "surrounding")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # for each recipe of a study
            check_store(store, "mine")
    assert caplog.text.count(f"${name} is set and not used") == 1
    names = {experiment.name for experiment in open_client(store).search_experiments()}
    assert names == {"Default", "mine"}


@pytest.mark.parametrize(("name", "value"), [("MLFLOW_RUN_ID", ""), ("MLFLOW_EXPERIMENT_NAME", "mine")])
def test_variable_without_effect_is_not_named(name, value, store, monkeypatch, caplog):
    store_module._warn_unused.cache_clear()
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        check_store(store, "mine")
    assert "not used" not in caplog.text


def test_model_is_logged_to_its_own_run_inside_another_run(store, monkeypatch):
    client = open_client(store)
    outer = client.create_run(find_experiment(client, store, "surrounding")).info
    made = client.create_run(find_experiment(client, store, "mine")).info
    client.log_param(made.run_id, "optimizer.lr", 0.1)
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.run_id)
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    mlflow.set_experiment("surrounding")
    with mlflow.start_run(log_system_metrics=False) as active:
        info = log_archive(made.run_id, TenClasses(64).eval(), digits_data())
        assert active.info.run_id == outer.run_id
    logged = client.get_logged_model(info.model_id)
    assert (logged.source_run_id, logged.experiment_id) == (made.run_id, made.experiment_id)
    assert logged.params == {"optimizer.lr": "0.1"}
    assert not client.get_run(outer.run_id).outputs.model_outputs
