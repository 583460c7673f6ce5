"""The tracking server is killed during a run and restarted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from advtrain.runs.folder import RunFolder
from tests.kit import advtrain, start_advtrain, wait_for


class Server:
    """`mlflow server` on a loopback address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "server.txt").open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mlflow",
                    "server",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--workers",
                    "1",
                    "--backend-store-uri",
                    f"sqlite:///{self.folder}/server.db",
                    "--artifacts-destination",
                    str(self.folder / "artifacts"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.healthy, "the MLflow server")

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


TRAIN = [
    "train",
    "digits",
    "--workers",
    "0",
    "--set",
    "evaluation.attack.num_steps=5",
    "--set",
    "evaluation.attack.num_restarts=1",
]


def tracked(server: Server):
    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return client, run


def assert_complete(server: Server, epochs: int) -> None:
    client, run = tracked(server)
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(
        range(1, epochs + 1)
    )
    assert "test/robust_accuracy" in run.data.metrics
    assert client.get_model_version_by_alias("digits", "challenger").run_id == run.info.run_id
    assert {a.path for a in client.list_artifacts(run.info.run_id, "report")} >= {"report/report.json"}


def the_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs").iterdir()
    return RunFolder(path)


def epochs_done(folder: Path) -> int:
    runs = list((folder / "runs").glob("*"))
    return len(RunFolder(runs[0]).metrics()) if runs else 0


@pytest.mark.slow
def test_training_finishes_without_mlflow_server_and_sync_uploads_rest(tmp_path, server):
    process = start_advtrain(
        *TRAIN, "--tracking-uri", server.uri, "--set", "training.epochs=12", cwd=tmp_path
    )
    wait_for(lambda: epochs_done(tmp_path) >= 3, "three epochs")
    server.kill()
    assert process.wait(200) == 1, (tmp_path / "output.txt").read_text()
    output = (tmp_path / "output.txt").read_text()
    run = the_run(tmp_path)
    assert "is unreachable" in output
    assert f"advtrain sync {run.name}" in output
    assert len(run.metrics()) == 12
    refused = advtrain("sync", run.name, cwd=tmp_path)
    assert refused.returncode == 2
    assert "still unreachable" in refused.stderr
    server.start()
    done = advtrain("sync", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(server, 12)
    assert run.facts()["status"] == "finished"


@pytest.mark.study
@pytest.mark.slow
def test_metrics_are_uploaded_when_server_returns_during_run(tmp_path, server):
    process = start_advtrain(
        *TRAIN, "--tracking-uri", server.uri, "--set", "training.epochs=100", cwd=tmp_path
    )
    wait_for(lambda: epochs_done(tmp_path) >= 3, "three epochs")
    server.kill()
    time.sleep(3)
    server.start()
    assert process.wait(250) == 0, (tmp_path / "output.txt").read_text()
    assert "MLflow is reachable again" in (tmp_path / "output.txt").read_text()
    assert_complete(server, 100)
