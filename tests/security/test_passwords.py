"""A password in a tracking URI is neither stored nor printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from advtrain.errors import UserError
from advtrain.tracking.store import has_password, tracking_uri
from pipelines.submit import check_shared_folders
from tests.kit import advtrain

SECRET = "s3cr3t-PW"
VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "PGPASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is restored at the end
        monkeypatch.delenv(name)


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
    with pytest.raises(UserError, match="holds a password") as refused:
        check_shared_folders(command)
    assert SECRET not in str(refused.value)


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
