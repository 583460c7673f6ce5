"""A password in a tracking URI is neither stored nor printed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from advtrain.errors import UserError
from advtrain.tracking.store import has_password, tracking_uri
from pipelines.job_command import find_problems
from pipelines.upload import working_tree
from tests.kit import advtrain, unset

SECRET = "s3cr3t-PW"
VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    unset(monkeypatch, *VARIABLES, "PGPASSWORD")


@pytest.mark.parametrize(
    ("given", "clean", "variable"),
    [
        (f"http://alice:{SECRET}@host:5000", "http://host:5000", "MLFLOW_TRACKING_PASSWORD"),
        (f"https://alice:{SECRET}@host/path?a=b", "https://host/path?a=b", "MLFLOW_TRACKING_PASSWORD"),
        (f"postgresql://alice:{SECRET}@host:1/db", "postgresql://alice@host:1/db", "PGPASSWORD"),
        (f"postgresql+psycopg://a%40b:{SECRET}@host/db", "postgresql+psycopg://a%40b@host/db", "PGPASSWORD"),
    ],
)
def test_password_moves_to_the_environment(given, clean, variable, monkeypatch):
    assert tracking_uri(given) == clean
    assert os.environ[variable] == SECRET
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri() == clean
    assert SECRET not in os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", given)
    tracking_uri("sqlite:////tmp/x.db")
    assert SECRET not in os.environ["MLFLOW_REGISTRY_URI"]


def test_encoded_password_is_decoded():
    tracking_uri("http://a%40b:p%2Fw%3A@host")
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("a@b", "p/w:")


def test_two_accounts_are_refused():
    tracking_uri(f"http://alice:{SECRET}@one")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME differ"):
        tracking_uri("http://bob:other@two")


@pytest.mark.parametrize(
    "given",
    [
        f"mysql://alice:{SECRET}@host/db",
        f"postgresql://host/db?password={SECRET}",
        f"http://h?token={SECRET}",
    ],
)
def test_password_that_cannot_move_is_refused(given):
    with pytest.raises(UserError, match="holds a password") as refused:
        tracking_uri(given)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "given", ["sqlite:////a:b@c/mlflow.db", "http://host:5000", "postgresql://alice@host:1/db"]
)
def test_uri_without_password_is_unchanged(given):
    assert not has_password(given)
    assert tracking_uri(given) == given


@pytest.mark.parametrize("words", [("--tracking-uri", "{}"), ("--tracking-uri={}",)])
def test_submit_refuses_a_command_with_a_password(words):
    command = ["train", "digits", "--runs", "/mnt/runs", *(w.format(f"http://a:{SECRET}@h") for w in words)]
    (found,) = find_problems(command)
    assert "holds a password" in found
    assert SECRET not in found


@pytest.mark.parametrize(
    "uri", [f"postgresql://u:{SECRET}@db/x?sslmode=require", f"https://u:{SECRET}@h/?a=b"]
)
def test_submit_refuses_a_password_before_a_query(uri):
    for words in (["--tracking-uri", uri], [f"--tracking-uri={uri}"]):
        (found,) = find_problems(["train", "digits", "--runs", "/mnt/runs", *words])
        assert "holds a password" in found


def checkout(folder: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["gate.pem", ".env", "secret.env", "tls.key", "signing"])
def test_submit_sends_no_keys(name, tmp_path, monkeypatch):
    checkout(tmp_path)
    (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVTRAIN_SIGNING_KEY", str(tmp_path / "signing"))
    with pytest.raises(UserError, match=f"'{name}' may hold a secret"):
        working_tree()
    (tmp_path / ".gitignore").write_text(name)
    assert working_tree() == tmp_path


def test_submit_runs_no_program_that_the_checkout_names(tmp_path, monkeypatch):
    checkout(tmp_path)
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/touched\n")
    hook.chmod(0o755)
    subprocess.run(["git", "config", "core.fsmonitor", str(hook)], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    working_tree()
    assert not (tmp_path / "touched").exists()


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_training_neither_prints_nor_stores_it(tmp_path):
    uri = f"http://alice:{SECRET}@127.0.0.1:9"
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = advtrain("train", "digits", "--set", "training.epochs=1", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert SECRET.encode() not in everything(tmp_path)
