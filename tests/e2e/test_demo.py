"""The two commands of the README, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from mlflow import MlflowClient

from tests.kit import ROOT, advtrain, user_environment


def demo_command() -> str:
    """What `make demo` runs after the installation, taken from make itself."""
    shown = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [line for line in shown.splitlines() if "advtrain tune" in line]
    return line


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_ends_in_three_minutes_with_a_champion_and_says_where_to_look(tmp_path):
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
        "models:/digits/1 (champion)",
    ):
        assert shown in done.stdout
    (ui,) = re.findall(r"look at it: \S*mlflow ui --backend-store-uri (\S+)", done.stdout)
    client = MlflowClient(ui)
    version = client.get_model_version_by_alias("digits", "champion")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_robust_accuracy"] > 0.7
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"
    assert any(name.startswith("system/") for name in parent.data.metrics)


def test_doctor_says_what_works_here(tmp_path):
    done = advtrain("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = re.findall(r"^ok +([\w ]+):", done.stdout, re.M)
    assert names == ["versions", "cores", "GPUs", "Ray", "tracking store", "run folder", "data"]
    assert "FAIL" not in done.stdout


def test_doctor_says_what_to_do_about_an_unusable_store(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    done = advtrain("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"FAIL +tracking store: .*--tracking-uri", done.stdout)
