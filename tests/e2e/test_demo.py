"""The commands `make demo` and `advtrain doctor` as a user runs them."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from mlflow import MlflowClient

from tests.kit import ROOT, advtrain, user_environment


def demo_command() -> str:
    """Return the command that `make demo` runs after the installation."""
    shown = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [line for line in shown.splitlines() if "advtrain tune" in line]
    return line


@pytest.mark.slow
@pytest.mark.ray
def test_demo_registers_challenger_within_three_minutes(tmp_path):
    command = demo_command().replace(".venv/bin/", f"{ROOT}/.venv/bin/")
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=user_environment(None),
        capture_output=True,
        text=True,
        timeout=400,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    assert seconds < 180
    for shown in (
        "clean accuracy",
        "robust accuracy, apgd-ce-100",
        "robust accuracy, square-5000",
        "trusted",
        "training time",
        "24 trials",
        "share of the score's variation",
        "models:/digits/1",
        "robust accuracy, worst class",
        "advtrain promote digits --version 1",
    ):
        assert shown in done.stdout
    (ui,) = re.findall(r"look at it: \S*mlflow ui --backend-store-uri (\S+)", done.stdout)
    client = MlflowClient(ui)
    version = client.get_model_version_by_alias("digits", "challenger")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/robust_accuracy"] > 0.7
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"
    assert "system/cpu_utilization_percentage" in parent.data.metrics


@pytest.mark.slow
def test_doctor_reports_ok_for_every_check(tmp_path):
    done = advtrain("doctor", "--data-root", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = re.findall(r"^(ok|warn|FAIL) +([\w ]+):", done.stdout, re.M)
    names = ["versions", "cores", "GPUs", "Ray", "tracking store", "run folder"]
    assert verdicts == [("ok", name) for name in names] + [("warn", "data")]


def test_doctor_suggests_fix_when_tracking_store_is_unusable(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    done = advtrain("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"FAIL +tracking store: .*--tracking-uri", done.stdout)
