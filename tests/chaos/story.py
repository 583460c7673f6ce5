"""A training on the cluster and its outcome."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from tests.cluster_kit import TOKEN, RayCluster
from tests.kit import start_advtrain, user_environment, wait_for
from tests.servers import answers, free_port

EPOCHS, STEPS = 10, 21  # digits in batches of 64
SETTINGS = {
    "training.epochs": str(EPOCHS),
    "training.checkpoint_steps": "5",
    "evaluation.attack": "{num_steps: 5}",
    "evaluation.suite": "null",
    "evaluation.validation.num_steps": "5",
}


#: Settings of a training that takes half a minute.
SLOW = {"adversary__num_steps": "150"}


@dataclass
class Story:
    """A row of the table."""

    fault: str
    back: str = "-"  # time from the fault to the first new step
    result: str = ""
    line: str = ""


@dataclass
class Training:
    """`advtrain train` on the cluster, in its own process."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def run(self) -> RunFolder | None:
        """Run folder, or None before it exists."""
        found = list((self.folder / "runs").glob("*/run.json"))
        return RunFolder(found[0].parent) if found else None

    @property
    def progress(self) -> dict[str, Any]:
        """Progress of the run: step, epoch and pid of rank 0."""
        values = self.run.progress() if self.run else None
        return values or {"step": 0, "epoch": 0, "pid": 0}

    @property
    def output(self) -> str:
        """Output of the command, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.folder / "output.txt").read_text())

    def until(self, epoch: int, seconds: float = 120) -> None:
        """Wait until training is some steps into that epoch."""
        self.wait(lambda: self.progress["step"] > (epoch - 1) * STEPS + 3, f"epoch {epoch}", seconds)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> float:
        """Wait until a condition holds while the command runs; return the seconds."""
        started = time.monotonic()
        wait_for(lambda: condition() or self.process.poll() is not None, what, seconds)
        assert condition(), f"ended before {what}:\n{self.output[-3000:]}"
        return time.monotonic() - started

    def back(self, pid: int, seconds: float = 120) -> float:
        """Wait for the first step of a new rank 0; return the seconds."""
        return self.wait(lambda: self.progress["pid"] != pid, "a step of a new worker group", seconds)

    def find_line(self, pattern: str) -> str:
        """Return the line of the output that matches the pattern."""
        match = re.search(rf"^.*{pattern}.*$", self.output, re.MULTILINE)
        assert match, f"no line says '{pattern}':\n{self.output[-3000:]}"
        return match[0]


def start(
    cluster: RayCluster,
    folder: Path,
    *words: str,
    workers: str = "2",
    env: dict[str, str] | None = None,
    **settings: str,
) -> Training:
    """Start a training of digits. Keyword settings are recipe paths with __ for dots."""
    changed = SETTINGS | {path.replace("__", "."): value for path, value in settings.items()}
    flags = [f for path, value in changed.items() for f in ("--set", f"{path}={value}")]
    flags += ["--set", f"training.num_workers={workers}"]
    command = ["train", "digits", "--address", cluster.address, *flags, *words]
    process = start_advtrain(*command, cwd=folder, env=TOKEN | (env or {}), behind=cluster.behind)
    return Training(process, folder)


def resume(cluster: RayCluster, training: Training, *words: str) -> Training:
    """Resume a training whose command has ended."""
    assert training.run is not None
    command = ["train", "--resume", training.run.name, "--address", cluster.address, *words]
    process = start_advtrain(*command, cwd=training.folder, env=TOKEN, behind=cluster.behind)
    return Training(process, training.folder)


def finished(training: Training, seconds: float = 240, code: int = 0) -> RunFolder:
    """Wait for the exit code; then each epoch is logged once in folder and MLflow, and the model registered."""
    assert training.process.wait(seconds) == code, training.output[-4000:]
    run = training.run
    assert run is not None
    assert run.facts()["status"] == "finished"
    lines = run.metrics()
    assert [(line["epoch"], line["step"]) for line in lines] == [(k, STEPS * k) for k in range(1, EPOCHS + 1)]
    client, tracked = mlflow_run(training.folder)
    assert tracked.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(tracked.info.run_id, "val/robust_accuracy")]
    assert steps == list(range(1, EPOCHS + 1))
    assert len(client.search_model_versions("name = 'digits'")) == 1
    return run


class TrackingServer:
    """MLflow server on the SQLite file of a folder; it can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=user_environment(),
                start_new_session=True,
            )
        wait_for(lambda: answers(f"{self.uri}/health"), "MLflow's server", 120)

    def kill(self) -> None:
        """Kill the server."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()


def mlflow_run(folder: Path) -> tuple[MlflowClient, Any]:
    """Return a client and the only MLflow run of a folder."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return client, run


def same(run: RunFolder, calm: RunFolder) -> str:
    """Check that both runs ended bit-identical: no step was lost or repeated."""
    one, other = (load_checkpoint(sorted(r.checkpoints.glob("step-*"))[-1]) for r in (run, calm))
    assert one.step == other.step == EPOCHS * STEPS
    for part in ("model", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert all(torch.equal(mine[key], value) for key, value in theirs.items()), part
    return "bit for bit as without"
