"""Runs that are killed, stopped and resumed, with real processes and signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from advtrain.runs.checkpoint import TrainState, load_checkpoint
from advtrain.runs.folder import RunFolder
from tests.kit import advtrain, start_advtrain, wait_for

SMALL = [
    "--set",
    "training.epochs=6",
    "--set",
    "evaluation.attack.num_steps=5",
    "--set",
    "evaluation.validation.num_steps=5",
    "--set",
    "training.checkpoint_steps=5",
    "--set",
    "adversary.num_steps=20",  # some seconds in total, so that signals arrive during training
]


def only_run(folder: Path) -> RunFolder:
    (path,) = (folder / "runs").iterdir()
    return RunFolder(path)


def final_state(run: RunFolder) -> TrainState:
    return load_checkpoint(sorted(run.checkpoints.glob("step-*"))[-1])


def in_mid_epoch(folder: Path, epoch: int) -> bool:
    """Return whether the last checkpoint is within an epoch (of 21 steps), the given one or a later one.

    progress.json is written only twice a second, and an epoch may be shorter.
    """
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("runs/*/checkpoints/step-*")]
    last = max(steps, default=0)
    return last > 21 * (epoch - 1) and last % 21 != 0


def assert_identical(run: RunFolder, reference: RunFolder) -> None:
    one, other = final_state(run), final_state(reference)
    assert one.step == other.step == 126
    for part in ("model", "optimizer"):
        assert all(torch.equal(getattr(one, part)[k], v) for k, v in getattr(other, part).items()), part
    timing = ("epoch_seconds", "samples_per_s")
    lines = [
        [{k: v for k, v in line.items() if k not in timing} for line in r.metrics()] for r in (run, reference)
    ]
    assert lines[0] == lines[1]


def mlflow_run(folder: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def assert_tracked_once(folder: Path, status: str = "FINISHED") -> None:
    client, run = mlflow_run(folder)
    assert run.info.status == status
    assert ("advtrain.message" in run.data.tags) == (status == "KILLED")
    if status == "FINISHED":
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "val/robust_accuracy")]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert len(client.search_model_versions("name = 'digits'")) == 1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return an uninterrupted run of the same recipe in one process."""
    folder = tmp_path_factory.mktemp("reference")
    done = advtrain("train", "digits", "--workers", "0", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


@pytest.mark.slow
def test_resume_after_sigkill_in_mid_epoch_is_bit_identical(tmp_path, uninterrupted):
    process = start_advtrain("train", "digits", "--workers", "0", *SMALL, cwd=tmp_path)
    wait_for(lambda: in_mid_epoch(tmp_path, 3), "the third epoch")
    process.kill()
    process.wait()
    run = only_run(tmp_path)
    assert run.facts()["status"] == "running"
    done = advtrain("train", "--resume", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert " epochs (2 done) in this process" in done.stdout
    assert_identical(run, uninterrupted)
    assert_tracked_once(tmp_path)
    again = advtrain("train", "--resume", run.name, cwd=tmp_path)
    assert again.returncode == 0
    assert "finished; nothing to do" in again.stdout


@pytest.mark.slow
def test_ctrl_c_saves_checkpoint_and_run_can_be_resumed(tmp_path, uninterrupted):
    process = start_advtrain("train", "digits", "--workers", "0", *SMALL, cwd=tmp_path)
    wait_for(lambda: in_mid_epoch(tmp_path, 2), "the second epoch")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    run = only_run(tmp_path)
    assert run.facts()["status"] == "stopped"
    output = (tmp_path / "output.txt").read_text()
    assert f"advtrain train --resume {run.name}" in output
    assert "Traceback" not in output
    assert_tracked_once(tmp_path, "KILLED")
    assert advtrain("train", "--resume", run.name, cwd=tmp_path).returncode == 0
    assert_identical(run, uninterrupted)
    assert_tracked_once(tmp_path)


@pytest.mark.slow
def test_resume_from_older_checkpoint_is_identical_and_logs_each_step_once(tmp_path, uninterrupted):
    kept = ("--set", "training.keep_checkpoints=40")
    process = start_advtrain("train", "digits", "--workers", "0", *SMALL, *kept, cwd=tmp_path)
    wait_for(lambda: in_mid_epoch(tmp_path, 4), "the fourth epoch")
    process.terminate()
    assert process.wait(60) == 130
    run = only_run(tmp_path)
    client, tracked = mlflow_run(tmp_path)
    assert len(client.get_metric_history(tracked.info.run_id, "train/loss")) >= 3
    for checkpoint in sorted(run.checkpoints.glob("step-*")):
        if int(checkpoint.name.removeprefix("step-")) > 30:
            for file in checkpoint.iterdir():
                file.write_bytes(file.read_bytes()[:-20])
    done = advtrain("train", "--resume", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_identical(run, uninterrupted)
    assert_tracked_once(tmp_path)


@pytest.mark.slow
def test_sigterm_during_evaluation_stops_run_and_it_can_be_resumed(tmp_path):
    long = ("--set", "training.epochs=1", "--set", "evaluation.suite=autoattack")
    process = start_advtrain("train", "digits", "--workers", "0", *long, cwd=tmp_path)
    wait_for(lambda: any(tmp_path.glob("runs/*/evaluations/*/units.jsonl")), "a first unit")
    process.terminate()
    assert process.wait(60) == 130
    run = only_run(tmp_path)
    assert run.facts()["status"] == "stopped"
    assert f"advtrain train --resume {run.name}" in (tmp_path / "output.txt").read_text()
    done = advtrain("train", "--resume", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "models:/digits/1" in done.stdout
    assert "advtrain.message" not in mlflow_run(tmp_path)[1].data.tags


@pytest.mark.ray
@pytest.mark.slow
def test_resume_after_worker_and_driver_kill_is_bit_identical(tmp_path):
    """A worker is killed and Ray restarts the group. Then the driver is killed and --resume continues."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = advtrain("train", "digits", *SMALL, cwd=whole)
    assert done.returncode == 0, done.stderr
    process = start_advtrain("train", "digits", *SMALL, cwd=broken)
    wait_for(lambda: in_mid_epoch(broken, 2), "the second epoch")
    run = only_run(broken)
    first = run.progress()["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(
        lambda: run.progress()["pid"] != first and in_mid_epoch(broken, 3), "the third epoch on new workers"
    )
    process.kill()
    process.wait()
    done = advtrain("train", "--resume", run.name, cwd=broken)
    assert done.returncode == 0, done.stderr
    assert_identical(run, only_run(whole))
    assert_tracked_once(broken)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.study), signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_ray_workers_with_checkpoint(tmp_path, number):
    process = start_advtrain("train", "digits", *SMALL, "--set", "training.epochs=60", cwd=tmp_path)
    wait_for(lambda: in_mid_epoch(tmp_path, 2), "the second epoch")
    process.send_signal(number)
    assert process.wait(90) == 130
    run = only_run(tmp_path)
    state = final_state(run)
    assert 0 < state.step < 60 * 21
    assert f"stopped at step {state.step}" in run.facts()["message"]
    assert_tracked_once(tmp_path, "KILLED")
