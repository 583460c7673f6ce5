"""The recipe mnist_guard: FGSM on MNIST overfits catastrophically, and the guard recovers."""

from __future__ import annotations

import json

import pytest

from advtrain.runs.folder import RunFolder
from tests.kit import advtrain


@pytest.mark.study
@pytest.mark.slow
def test_guard_recovers_from_catastrophic_overfitting_on_mnist(data_root, tmp_path):
    done = advtrain("train", "mnist_guard", "--data-root", str(data_root), cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: catastrophic overfitting in epoch" in done.stdout
    (run,) = (RunFolder(path) for path in (tmp_path / "runs").iterdir())
    record = run.recoveries()[0]
    assert record["robust_accuracy"] < record["best_before"] - 0.2
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    assert (
        lines[-1]["val_robust_accuracy"] > record["best_before"]
    )  # the recovered model is better than before the collapse

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.get_run(json.loads((run.path / "tracking.json").read_text())["run_id"])
    assert json.loads(found.data.tags["advtrain.guard"])[0]["epoch"] == record["epoch"]
    assert found.data.metrics["train/guard_recoveries"] == len(run.recoveries())
