"""Paths that users write: in options, variables and recipes."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from advtrain.data import DataConfig, data_root, load_data
from advtrain.data.locate import data_config
from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder
from advtrain.tracking.relocate import relocate
from advtrain.tracking.store import (
    artifact_location,
    find_experiment,
    open_client,
    sqlite_file,
    sqlite_uri,
    tracking_uri,
)
from advtrain.user_paths import as_written, expand, user_path
from pipelines.cli.main import app
from pipelines.cli.options import build_workspace, expand_path, shipped

#: Name with every character that some URI, shell or format gives a meaning.
ODD = "a b%20#ü?&;'"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home folder, which is not the working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    for name in ("ADVTRAIN_DATA_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "HOME"),
        ("~/a", "HOME/a"),
        ("$PLACE/a", "HOME/a"),
        ("${PLACE}/a", "HOME/a"),
        ("${PLACE}a", "HOMEa"),
        ("./~", "./~"),
        ("a~/b", "a~/b"),
        ("a$$PLACE", "a$PLACE"),
        ("5$", "5$"),
        ("$5/a$", "$5/a$"),
        (ODD, ODD),
        ("s3://bucket/$PLACE", "s3://bucket/HOME"),
    ],
)
def test_expand_replaces_home_and_variables_only(home, text, expected):
    assert expand(text, "path") == expected.replace("HOME", str(home))


@pytest.mark.parametrize("text", ["$NOT_SET/a", "${NOT_SET}", "$EMPTY/a", "${}", "~nobody-of-that-name/a"])
def test_expand_names_what_is_missing(home, text, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError) as caught:
        expand(text, "data.path")
    assert str(caught.value).startswith(f"data.path '{text}': ")


def test_as_written_is_undone_by_expand(home):
    path = Path("/a/$PLACE/~/$$x")
    assert user_path(as_written(path), "path") == path


def write_npz(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=np.zeros((60, 4, 4), np.uint8), y=np.arange(60) % 3)


@pytest.mark.parametrize("text", ["~/d.npz", "$PLACE/d.npz", f"{ODD}/d$$x.npz"])
def test_data_path_is_expanded(home, text):
    write_npz(user_path(text, "path"))
    root = data_root(".")
    assert len(load_data(DataConfig(source="npz", path=text), root).train) > 0
    assert len(load_data(data_config(text, root), root).train) > 0


def test_data_path_names_a_variable_that_is_not_set(home):
    with pytest.raises(UserError, match=r"data\.path '\$NOT_SET/d\.npz': the variable \$NOT_SET is not set"):
        load_data(DataConfig(source="npz", path="$NOT_SET/d.npz"), home)


def test_workspace_expands_runs_data_root_and_store(home):
    workspace = build_workspace("~/runs", "sqlite:///~/m.db", "$PLACE/data", None)
    assert (workspace.runs, workspace.data_root) == (home / "runs", home / "data")
    assert workspace.tracking_uri == f"sqlite:///{home}/m.db"
    with pytest.raises(UserError, match="--runs"):
        build_workspace("$NOT_SET/runs", None, None, None)


def test_references_to_files_and_runs_are_expanded(home):
    (home / "r.yaml").write_text("")
    assert shipped("~/r.yaml", home, "recipe") == home / "r.yaml"
    (home / "one").mkdir()
    (home / "one" / "run.json").write_text("{}")
    assert RunFolder.find(Path("runs"), "$PLACE/one").path == home / "one"


def test_path_parameters_of_every_command_are_expanded():
    """A new parameter of type Path must have the callback, too."""
    found = []
    for command in app.registered_commands:
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            kind, *about = get_args(parameter.annotation) or [None]
            if Path in (kind, *get_args(kind)):
                found.append(name)
                assert about[0].callback is expand_path, f"{command.callback.__name__}: {name}"
    assert {"json", "out", "inputs"} <= set(found)


def test_path_option_is_expanded(home):
    done = CliRunner().invoke(app, ["recipes", "--json", "~/recipes.json"])
    assert done.exit_code == 0, done.output
    assert (home / "recipes.json").is_file()


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///m.db", "WORK/m.db"),
        ("sqlite:///~/m.db", "HOME/m.db"),
        ("sqlite:///$PLACE/m.db", "HOME/m.db"),
        ("sqlite:////tmp/a b#ü/m.db", "/tmp/a b#ü/m.db"),
        ("sqlite:////tmp/50%25/m.db", "/tmp/50%/m.db"),
        ("sqlite:////tmp/a%3F%24b.db", "/tmp/a?$b.db"),
        ("sqlite:////tmp/m.db?timeout=3", "/tmp/m.db"),
    ],
)
def test_tracking_uri_names_the_file_that_sqlalchemy_opens(home, uri, file):
    from sqlalchemy.engine import make_url

    found = tracking_uri(uri)
    expected = file.replace("WORK", os.getcwd()).replace("HOME", str(home))
    assert str(sqlite_file(found)) == make_url(found).database == expected
    assert tracking_uri(found) == found


def test_registry_uri_is_expanded(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///~/r.db")
    tracking_uri()
    assert os.environ["MLFLOW_REGISTRY_URI"] == f"sqlite:///{home}/r.db"


def test_store_in_an_odd_folder_keeps_artifacts_beside_its_file(home, store):
    folder = home / ODD
    folder.mkdir()
    Path(sqlite_file(store)).rename(folder / "mlflow.db")
    uri = sqlite_uri(folder / "mlflow.db")
    client = open_client(uri)
    run = client.create_run(find_experiment(client, uri, "e")).info
    (home / "note").write_text("x")
    client.log_artifact(run.run_id, str(home / "note"))
    assert (folder / "mlruns" / run.run_id / "artifacts" / "note").is_file()
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["note"]
    assert sorted(path.name for path in home.iterdir()) == [ODD, "note"]


def test_relocate_finds_artifacts_in_an_odd_folder(home, store):
    for name in (ODD, "new%"):
        (home / name / "mlruns").mkdir(parents=True)
    Path(sqlite_file(store)).rename(home / ODD / "mlflow.db")
    uri = sqlite_uri(home / ODD / "mlflow.db")
    find_experiment(open_client(uri), uri, "e")
    (home / ODD / "mlflow.db").rename(home / "new%" / "mlflow.db")
    (home / ODD / "mlruns").rmdir()
    uri = sqlite_uri(home / "new%" / "mlflow.db")
    assert artifact_location(home / ODD / "mlruns") in relocate(uri)
    found = open_client(uri).get_experiment_by_name("e")
    assert found.artifact_location == artifact_location(home / "new%" / "mlruns")
    assert relocate(uri) == {}
