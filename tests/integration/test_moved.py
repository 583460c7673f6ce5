"""A working folder that was renamed: nothing is made at the old place, and the store is found at the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service import utils

from advtrain.errors import UserError
from advtrain.registry.export import log_archive
from advtrain.registry.versions import register
from advtrain.runs.folder import RunFolder, file_lock, lock_folder
from advtrain.tracking.parent_run import ParentRun
from advtrain.tracking.relocate import relocate
from advtrain.tracking.store import find_experiment, open_client
from advtrain.tracking.tracker import Tracker
from tests.kit import ROOT, digits_data, digits_recipe, run_here, train_here, user_environment
from tests.registry_kit import TenClasses, flags, make_evaluation


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Path, RunFolder]:
    """Return the old and the new place of a working folder with a tracked run, and the run at its new place."""
    old, new = tmp_path / "old", tmp_path / "new"
    recipe = digits_recipe("training.epochs=1")
    _, run = train_here(recipe, old / "runs")
    run.update(environment={"versions": {}, "git": {}}, trained=True)
    tracker = Tracker.start(run, recipe, digits_data(recipe), store(old))
    run.update(status="finished")
    assert tracker.sync()
    old.rename(new)
    utils._artifact_repos_cache.clear()  # as in a new process
    return old, new, RunFolder(new / "runs" / run.name)


def test_run_finds_the_moved_store(moved):
    old, new, run = moved
    tracker = Tracker.reopen(run, store(new))
    assert tracker.sync()
    assert tracker.state["uri"] == store(new)
    with pytest.raises(UserError, match="is gone; name its present place"):
        Tracker.reopen(run, store(old)) if not (new / "mlflow.db").unlink() else None
    assert not old.exists(), "nothing may be made at the old place"


def test_parent_run_finds_the_moved_store(tmp_path):
    (tmp_path / "old").mkdir()
    parent = ParentRun.start(store(tmp_path / "old"), "e", "n", {})
    (tmp_path / "old").rename(tmp_path / "new")
    assert parent.reopened(store(tmp_path / "new")).uri == store(tmp_path / "new")
    with pytest.raises(UserError, match="is gone"):
        parent.reopened(store(tmp_path / "other"))
    assert not (tmp_path / "old").exists()


def test_relocate_corrects_artifact_paths(moved, capsys):
    old, new, run = moved
    client = open_client(store(new))
    tracker = Tracker.reopen(run, store(new))
    with pytest.raises(UserError, match="advtrain relocate"):
        find_experiment(client, store(new), "digits")
    assert run_here("relocate", "--tracking-uri", store(new)) == 0
    assert str(old) in capsys.readouterr().out
    run_id = tracker.state["run_id"]
    assert client.get_run(run_id).info.artifact_uri.startswith(str(new))
    assert (
        Path(client.download_artifacts(run_id, "recipe.yaml")).read_text()
        == (run.path / "recipe.yaml").read_text()
    )
    report = make_evaluation(flags(50, 45), flags(50, 30)).report
    assert register(run, tracker, TenClasses(64), digits_recipe(), digits_data(), report).version == "1"
    assert relocate(store(new)) == {}
    assert not old.exists()


def test_relocate_needs_the_artifacts_beside_the_store(tmp_path):
    open_client(store(tmp_path))
    with pytest.raises(UserError, match="move mlruns"):
        relocate(store(tmp_path))
    with pytest.raises(UserError, match="no SQLite store"):
        relocate("http://127.0.0.1:9")


def test_kill_between_logging_and_registering_leaves_no_second_model(moved):
    _, new, run = moved
    relocate(store(new))
    tracker = Tracker.reopen(run, store(new))
    run_id = tracker.state["run_id"]
    log_archive(run_id, TenClasses(64).eval(), digits_data())  # the process dies here
    report = make_evaluation(flags(50, 45), flags(50, 30)).report
    register(run, tracker, TenClasses(64), digits_recipe(), digits_data(), report)
    experiment = tracker.client.get_run(run_id).info.experiment_id
    assert len(tracker.client.search_logged_models([experiment])) == 1


def test_lock_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot lock"), file_lock(tmp_path / "lock", "busy"):
        pass
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("closed", ["pipe", "file"])
def test_closed_output_is_no_traceback(closed, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = f"{sys.executable} -m pipelines recipes" + (" >&-" if closed == "file" else "")
    env = user_environment({"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)})
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=env, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.stderr == ""


def test_lock_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert lock_folder().stat().st_mode & 0o777 == 0o700
    lock_folder().chmod(0o777)
    with pytest.raises(UserError, match="only you can access.*TMPDIR"):
        lock_folder()
    lock_folder_path = tmp_path / f"advtrain-{os.getuid()}"
    lock_folder_path.rmdir()
    lock_folder_path.symlink_to(tmp_path)
    with pytest.raises(UserError, match="only you can access.*TMPDIR"):
        lock_folder()
