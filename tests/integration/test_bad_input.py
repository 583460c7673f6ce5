"""Bad input at the command line: one clear message, a non-zero exit code, no partial files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from advtrain.runs.folder import RunFolder
from pipelines.cli.main import main
from pipelines.doctor import _store
from tests.kit import RECIPES, advtrain, mounted, user_environment


@pytest.fixture
def tiny_disk(tmp_path):
    """Mount a file system of 40 KiB; skip the test where mounting is not permitted."""
    with mounted(tmp_path / "disk", "size=40k") as folder:
        yield folder


@pytest.mark.slow
def test_train_prints_one_error_when_disk_is_full(tiny_disk, tmp_path):
    done = advtrain("train", "digits", "--workers", "0", "--runs", str(tiny_disk / "runs"), cwd=tmp_path)
    assert done.returncode in (1, 2), done.stdout
    assert "No space left on device" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert "make room" in done.stderr + done.stdout


def test_doctor_accepts_store_on_second_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        assert _store("sqlite:///mlflow.db").endswith("reachable and writable")


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Run a command that must be rejected, in this process; return its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it to the last store used
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        assert not (tmp_path / "runs").exists(), "a run folder was left behind"
        assert [
            p for p in tmp_path.rglob("*") if p not in before and not p.name.startswith("mlflow.db")
        ] == []
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "nothing.yaml"], "cannot read the recipe 'nothing.yaml'"),
        (["train"], "name a recipe"),
        (["evaluate", "models:/none/1", "--suite", "autoatack"], "did you mean 'autoattack'"),
        (["compare", "loses"], "did you mean 'losses'"),
        (["compare", "nothing.yaml"], "cannot read the study 'nothing.yaml'"),
        (
            ["train", "digits", "--allow-code", "--set", "objective.custom.function=nomodule:f"],
            "objective.custom.function 'nomodule:f': cannot import 'nomodule'",
        ),
        (
            ["train", "digits", "--set", "objective.custom.function=os:getcwd"],
            "objective.custom.function 'os:getcwd' runs code",
        ),
        (
            ["train", "diabetes", "--set", "data.source=digits"],
            "digits has labels, but adv_mse belongs to a regression",
        ),
        (["train", "digits", "--set", "optimzer.lr=1"], "unknown key 'optimzer'; did you mean 'optimizer'"),
        (["train", "digits", "--set", "optimizer.lr=fast"], "'optimizer.lr'"),
        (
            ["train", "digits", "--set", "adversary.eps=-1"],
            "'adversary.eps': Input should be greater than or equal to 0",
        ),
        (["train", "digits", "--set", "optimizer.lr=1e400"], "'optimizer.lr'"),
        (
            ["train", "digits", "--set", "training.changes=[{epoc: 3}]"],
            "unknown key 'training.changes.0.epoc'; did you mean 'epoch'?",
        ),
        (["train", "digits", "--set", "model.name=cnn3"], "unknown model 'cnn3'; did you mean 'cnn4'?"),
        (["train", "digits", "--set", "model.args.wdith=3"], "takes no 'wdith'; did you mean 'width'?"),
        (
            ["train", "digits", "--allow-code", "--set", "model.name=tests.kit:fails"],
            "model 'tests.kit:fails' with args {}: RuntimeError: out of order",
        ),
        (
            ["train", "digits", "--allow-code", "--set", "model.name=tests.kit:nothing_to_train"],
            "model 'tests.kit:nothing_to_train' has no parameters that can be trained",
        ),
        (["tune", "digits_quick", "--set", "model.name=cnn3"], "unknown model 'cnn3'"),
        (["train", "digits", "--workers", "-1"], "greater than or equal to 0"),
        (["train", "digits", "--set", "model.name=os:system"], "--allow-code"),
        (["train", "mnist", "--data-root", "nowhere"], "MNIST is not in"),
        (["train", "digits", "--set", "data.validation_fraction=0.0001"], "without some of the 10 classes"),
        (["train", "--resume", "digits-000000-1"], "no run 'digits-000000-1'"),
        (["train", "--resume", "x", "--set", "seed=1"], "keeps its recipe"),
        (["train", "digits", "--tracking-uri", "mlruns"], "is no database and no server"),
        (["train", "digits", "--tracking-uri", "http://127.0.0.1:9"], "cannot be used"),
        (["evaluate", "models:/nothing@champion"], "cannot load 'models:/nothing@champion'"),
        (["evaluate", "nothing"], "no run 'nothing'"),
        (["show", "digits", "--set", "seed=x"], "'seed'"),
        (["train", "--frobnicate"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_rejects_bad_arguments_with_suggestion(refuse, arguments, message):
    assert message in refuse(*arguments)


def test_train_names_sample_when_data_contains_nan(tmp_path, refuse):
    x = np.random.default_rng(0).random((100, 8, 8), dtype=np.float32)
    x[17, 2, 3] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(100) % 4)
    message = refuse("train", "digits", "--set", "data={source: npz, path: d.npz}", "--data-root", ".")
    assert "sample 17 contains nan" in message


def test_train_rejects_invalid_store_before_training(tmp_path, refuse):
    """The file is not a database, so SQLite rejects it."""
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says " * 50)
    assert "cannot be used" in refuse("train", "digits")


def test_train_rejects_store_in_read_only_folder_without_retrying(tmp_path, refuse):
    with mounted(tmp_path / "disk", "ro") as folder:
        before = time.monotonic()
        message = refuse("train", "digits", "--tracking-uri", f"sqlite:///{folder}/new/mlflow.db")
        assert time.monotonic() - before < 30, "MLflow alone tries for two minutes"
    assert f"the folder {folder} cannot be written" in message


def test_train_rejects_locked_store(tmp_path, refuse):
    locked = sqlite3.connect(tmp_path / "mlflow.db")
    locked.execute("BEGIN EXCLUSIVE")
    message = refuse("train", "digits")
    locked.close()
    assert "locked" in message


def test_train_rejects_run_folder_that_cannot_be_created(tmp_path, refuse):
    (tmp_path / "file").write_text("")
    message = refuse("train", "digits", "--runs", "file/runs")
    assert "cannot write the run folder" in message


@pytest.mark.slow
def test_train_warns_about_rounded_epsilon_and_continues(tmp_path):
    done = advtrain(
        "train",
        "digits",
        "--workers",
        "0",
        "--set",
        "training.epochs=1",
        "--set",
        "adversary.eps=0.031",
        "--set",
        "evaluation.attack.num_restarts=1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "0.031 is not 8/255" in done.stdout


def test_resume_fails_when_run_is_locked_by_another_process(tmp_path):
    run = RunFolder.create(
        tmp_path / "runs", "digits", "0" * 64, (RECIPES / "digits.yaml").read_text(), {"status": "stopped"}
    )
    with run.locked():
        done = advtrain("train", "--resume", run.name, cwd=tmp_path)
    assert done.returncode == 2
    assert "in use by another process" in done.stderr


@pytest.mark.slow
def test_train_keeps_last_checkpoint_when_disk_fills_up(tmp_path):
    """A file size limit is set after the first checkpoint, so that a later write fails."""
    code = (
        "import resource, signal, sys, threading, time, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def limit():\n"
        "    while not list(pathlib.Path('runs').glob('*/checkpoints/step-*')): time.sleep(0.01)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "threading.Thread(target=limit, daemon=True).start()\n"
        "from pipelines.cli.main import main\n"
        "main(['train', 'digits', '--workers', '0', '--tracking-uri', sys.argv[1]])\n"
    )
    store = tmp_path / "store"
    store.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{store}/mlflow.db"],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot write the checkpoint" in done.stdout
    assert "--resume" in done.stdout
    (path,) = (tmp_path / "runs").iterdir()
    run = RunFolder(path)
    assert run.facts()["status"] == "failed"
    assert list(run.checkpoints.glob("step-*"))
    assert not list(run.checkpoints.glob(".step-*"))
