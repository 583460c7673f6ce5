"""Studies on real Ray and a real MLflow store: cells, teachers, failures, kills and the report."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import yaml

from pipelines.workspace import Workspace
from tests.cli_kit import compare
from tests.kit import advtrain, start_advtrain, wait_for
from tests.unit.tuning.test_study_grid import DISTILLED, SMALL, SOURCE
from tuning.study.grid import load_study

pytestmark = pytest.mark.ray

METHODS = SMALL["methods"] | {
    "hat": {"objective": {"clean_ce": 1, "trades_kl": 1, "hat": 0.5}, "teacher": "standard"},
    "diverges": {"objective": {"adv_ce": 1}, "optimizer.lr": 1e8},
    "taught by it": {"objective": {"clean_ce": 1, "hat": 0.5}, "teacher": "diverges"},
    "distilled": DISTILLED,
    "started": {"objective": {"clean_ce": 1}, "model.name": "cnn2", "start": "large"},
}
STUDY = SMALL | {
    "optimizers": {"sgd": {}},
    "seeds": [0],
    "methods": METHODS,
    "sources": {"large": SOURCE | {"evaluation": {"threat": {"eps": 0.1}, "suite": "apgd-ce-5"}}},
    "base": SMALL["base"]
    | {"evaluation.attack": {"num_steps": 5}, "evaluation.validation": {"num_steps": 3}},
}


def workspace(tmp_path, store):
    return Workspace(runs=tmp_path / "runs", tracking_uri=store, data_root=tmp_path)


def test_study_trains_cells_and_reports_results_and_failures(ray_cluster, store, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    study = load_study(path, quick=False)
    assert compare(study, workspace(tmp_path, store), quick=False, allow_code=False) == 1  # two cells failed
    report = tmp_path / "runs" / "study-small" / "report"
    values = {v["method"]: v for v in json.loads((report / "results.json").read_text())}
    assert "NaN or infinite" in values["diverges"]["failure"]
    assert values["taught by it"]["failure"] == "its teacher diverges failed"
    for method in ("standard", "madry", "hat", "large", "distilled", "started"):
        assert not values[method]["failure"]
        assert values[method]["clean_accuracy"] > 0.2
    assert "madry" in capsys.readouterr().out

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = runs.pop("small")
    assert parent.info.status == "FINISHED"
    assert (
        parent.data.metrics["test/digits/mlp/sgd/madry/robust_accuracy"] == values["madry"]["robust_accuracy"]
    )
    assert {a.path for a in client.list_artifacts(parent.info.run_id, "report")} >= {"report/report.md"}
    assert "trained first, source large" in (report / "report.md").read_text()
    assert len(runs) == 7
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    statuses = sorted(run.info.status for run in runs.values())
    assert statuses == ["FAILED", *["FINISHED"] * 6]

    # A second call trains no finished cell again and uploads the missing MLflow run.
    (missed,) = (tmp_path / "runs" / "study-small" / "cells").glob("*-madry-*/tracking.json")
    missed.unlink()
    folders = list((tmp_path / "runs" / "study-small" / "cells").glob("*/result.json"))
    before = {f: f.stat().st_mtime_ns for f in folders}
    compare(study, workspace(tmp_path, store), quick=False, allow_code=False)
    assert {f: f.stat().st_mtime_ns for f in folders} == before
    assert missed.exists()
    assert len(client.search_runs([experiment])) == 9


@pytest.mark.slow
def test_study_resumes_after_sigkill(tmp_path):
    long = {"objective": {"adv_ce": 1}, "training.epochs": 15}  # seconds per cell, so that the kill hits one
    methods = {f"m{i}": long | {"adversary.num_steps": i + 3} for i in range(6)}
    study = STUDY | {"methods": methods, "baseline": {"method": "m0"}, "sources": {}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    process = start_advtrain("compare", "study.yaml", cwd=tmp_path)
    cells = tmp_path / "runs" / "study-small" / "cells"
    wait_for(lambda: len(list(cells.glob("*/result.json"))) >= 2, "two cells", 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in cells.glob("*/result.json")}
    assert 2 <= len(done) < 6
    again = advtrain("compare", "study.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    found = re.search(r"(\d+) of them are already done", again.stdout)
    assert found is not None
    assert int(found[1]) >= len(
        done
    )  # a worker may finish its cell before it notices that its driver is dead
    assert {f: f.stat().st_mtime_ns for f in done} == done
    assert len(list(cells.glob("*/result.json"))) == 6


#: Margin in points of robust accuracy over standard training on digits, for every method of the study.
MARGIN = 10.0


@pytest.mark.slow
@pytest.mark.study
@pytest.mark.parametrize("name", ["losses", "optimizers", "fraction"])
def test_quick_study_finishes_within_five_minutes(name, tmp_path):
    """In the study `losses`, every shipped method is also more robust than standard training."""
    started = time.monotonic()
    done = advtrain("compare", name, "--quick", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 300
    report = tmp_path / "runs" / f"study-{name}-quick" / "report"
    robust = {
        v["method"]: 100 * v["robust_accuracy"] for v in json.loads((report / "results.json").read_text())
    }
    if name == "losses":
        standard = robust.pop("standard")
        assert {m: r for m, r in robust.items() if r < standard + MARGIN} == {}
    if name == "fraction":
        assert robust["1"] > robust["0"] + MARGIN
