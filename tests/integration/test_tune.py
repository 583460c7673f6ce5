"""Campaigns on real Ray Tune and MLflow: search, early stop, kill, resume, extension, registration."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from advtrain.recipe import load_recipe
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.tracking.metrics import GROUPS
from advtrain.training import Outcome, Session, run_worker
from pipelines.workspace import Workspace
from tests.cli_kit import resume, tune
from tests.kit import advtrain, digits_data, start_advtrain, wait_for
from tests.unit.tuning.surface import TOP, height, ledger_of
from tuning.trials import Ledger, Trial

pytestmark = pytest.mark.ray


class Silent:
    """A watcher that records its calls."""

    def __init__(self):
        self.heard = []

    def began(self, trial: Trial) -> None:
        self.heard.append(("began", trial.label))

    def on_result(self, trial: Trial, result: dict) -> None:
        self.heard.append((trial.label, result["epoch"]))

    def ended(self, trial: Trial) -> None:
        self.heard.append((trial.status, trial.label))


def on_surface(monkeypatch, epochs: int = 1):
    """Replace training by a known surface; everything else is unchanged."""
    import tuning.runner
    from tuning.trainable import TrialTrainable

    class Surface(TrialTrainable):
        def _begin(self, config):
            super()._begin(config)
            self.recipe = load_recipe(self.run_folder.path / "recipe.yaml")
            self.training = follow(self.run_folder, self.point, self.recipe.training.epochs)

    def follow(run, point, epochs):
        for epoch in range(len(run.metrics()) + 1, epochs + 1):
            robust = height(point) * epoch / epochs
            line = {"epoch": epoch, "val_robust_accuracy": robust, "val_clean_accuracy": 0.9}
            run.append_metrics(line)
            yield line
        return Outcome("finished")

    monkeypatch.setattr(tuning.runner, "TrialTrainable", Surface)


@pytest.mark.slow
def test_searcher_finds_maximum_of_known_surface(ray_cluster, monkeypatch, tmp_path):
    from tuning.runner import run_trials

    on_surface(monkeypatch)
    ledger = ledger_of(
        tmp_path, {"budget": {"trials": 30}}, "training.epochs=1", "training.cpus_per_worker=2"
    )
    run_trials(ledger, digits_data(), Silent(), None)
    assert {t.message or t.status for t in ledger.trials} == {"finished"}
    assert len(ledger.trials) == 30
    best = max(ledger.searched, key=lambda t: t.best()["robust_accuracy"])
    assert best.best()["robust_accuracy"] > 0.99
    assert best.point["adversary.eps"] == pytest.approx(TOP["adversary.eps"], abs=0.05)


@pytest.mark.slow
def test_asha_stops_worst_trials_and_restores_rungs_on_resume(ray_cluster, monkeypatch, tmp_path):
    from tuning.runner import run_trials

    on_surface(monkeypatch)
    changes = {
        "scheduler": {"kind": "asha", "grace_period": 1, "reduction_factor": 3},
        "search": {"algorithm": "random"},
    }
    ledger = ledger_of(
        tmp_path, changes | {"budget": {"trials": 18}}, "training.epochs=9", "training.cpus_per_worker=2"
    )
    run_trials(ledger, digits_data(), Silent(), None)
    ended = {t.label: t for t in ledger.trials if t.status == "stopped"}
    finished = [t for t in ledger.trials if t.status == "finished"]
    assert len(ended) > len(finished) > 0
    assert all(len(t.run.metrics()) in (1, 3) for t in ended.values())
    assert all(len(t.run.metrics()) == 9 for t in finished)
    # No trial that stopped at the first rung was the best one there.
    first = sorted((t.lines()[0]["robust_accuracy"] for t in ledger.trials), reverse=True)
    assert all(t.lines()[0]["robust_accuracy"] < first[0] for t in ended.values())
    again = Ledger.find(tmp_path, ledger.name, {"budget.trials": 19})
    worst = {"optimizer.lr": 1e-4, "adversary.eps": 0.3}
    monkeypatch.setattr("tuning.searchers.Searcher.suggest", lambda searcher, trials: (worst, {}))
    run_trials(again, digits_data(), Silent(), None)
    assert (again.searched[-1].status, len(again.searched[-1].run.metrics())) == ("stopped", 1)


@pytest.mark.slow
def test_search_stops_at_time_budget_across_resumes(ray_cluster, monkeypatch, tmp_path):
    from tuning.runner import run_trials

    on_surface(monkeypatch)
    ledger = ledger_of(tmp_path, {"budget": {"trials": 900, "wall": "10s"}}, "training.epochs=500")
    started = time.monotonic()
    run_trials(ledger, digits_data(), Silent(), None)
    assert time.monotonic() - started < 40
    assert 0 < len(ledger.trials) < 900
    assert any("the budget" in trial.message for trial in ledger.trials)
    assert all(trial.status in ("finished", "stopped") for trial in ledger.trials)
    again = Ledger.find(tmp_path, ledger.name, {})
    run_trials(again, digits_data(), Silent(), None)
    assert len(again.trials) == len(ledger.trials)


CAMPAIGN = {
    "recipe": "digits",
    "base": {
        "training.num_workers": 0,
        "training.cpus_per_worker": 2,  # two trials at a time on the four CPUs of the test cluster
        "training.epochs": 3,
        "model.name": "mlp",
        "evaluation.validation.num_steps": 3,
        "optimizer.schedule.kind": "constant",
    },
    "space": {"optimizer.lr": {"choice": [0.005, 1e8, 0.002]}},
    "objectives": {"robust_accuracy": "max", "clean_accuracy": "max"},
    "search": {"algorithm": "grid"},
    "scheduler": {"kind": "none"},
    "budget": {"trials": 3},
    "register": {"top": 1, "suite": "quick"},
}


def workspace(tmp_path, store):
    return Workspace(runs=tmp_path / "runs", tracking_uri=store, data_root=tmp_path)


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CAMPAIGN | changes))
    return path


def load(path: Path):
    from pipelines.cli.options import RECIPES
    from tuning.campaign import load_campaign

    return load_campaign(path, lambda name: RECIPES / f"{name}.yaml", [], {}, allow_code=False)


@pytest.mark.slow
def test_campaign_is_tracked_confirmed_registered_and_extended(ray_cluster, store, tmp_path, capsys):
    plan = load(written(tmp_path, confirm={"top": 1, "seeds": 1}))
    assert tune(plan, workspace(tmp_path, store), None) == 0
    shown = capsys.readouterr().out
    assert "NaN or infinite" in shown
    assert "`advtrain promote digits --version 1` tries to promote it" in shown
    (folder,) = (tmp_path / "runs").glob("small-*-1")
    ledger = Ledger.find(tmp_path / "runs", folder.name, {})
    assert [t.status for t in ledger.searched] == ["finished", "failed", "finished"]
    (confirmation,) = [t for t in ledger.trials if t.of is not None]
    assert (confirmation.status, ledger.facts()["status"]) == ("finished", "finished")
    pictures = {p.stem for p in (folder / "report").glob("*.png")}
    assert {"history", "slices", "front", "budget"} <= pictures

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("digits").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = runs.pop(folder.name)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["system/trials"] == 3
    assert parent.data.params["budget.trials"] == "3"
    assert parent.data.params["registered"] == "models:/digits/1"
    assert {metric.split("/")[0] for metric in parent.data.metrics} <= set(GROUPS)
    assert parent.data.tags["advtrain.registered"] == "models:/digits/1"
    assert "## Why " in parent.data.tags["mlflow.note.content"]
    assert {a.path for a in client.list_artifacts(parent.info.run_id, "report")} >= {
        "report/report.html",
        "report/report.md",
        "report/front.png",
    }
    assert len(runs) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert sorted(run.info.status for run in runs.values()) == ["FAILED", *["FINISHED"] * 3]
    winner = client.get_model_version_by_alias("digits", "challenger")
    assert client.get_run(winner.run_id).data.metrics["test/robust_accuracy"] > 0.2
    assert len(client.get_metric_history(winner.run_id, "val/robust_accuracy")) == 3

    # The budget grows by two trials, but the grid is exhausted: nothing is trained.
    before = {f: f.stat().st_mtime_ns for f in folder.glob("trials/*/metrics.jsonl")}
    assert resume(folder.name, workspace(tmp_path, store), {"budget.trials": 5}, None) == 0
    assert {f: f.stat().st_mtime_ns for f in folder.glob("trials/*/metrics.jsonl")} == before
    assert len(client.search_runs([experiment])) == 5
    assert len(client.search_model_versions("name = 'digits'")) == 1
    params = client.get_run(parent.info.run_id).data.params
    assert (params["budget.trials"], params["budget.trials.2"]) == ("3", "5")


#: Trials take some seconds, so that a kill hits them.
LONG = {
    "base": CAMPAIGN["base"] | {"training.epochs": 12, "model.name": "cnn2", "training.cpus_per_worker": 1},
    "space": {"optimizer.lr": {"loguniform": [2e-3, 1e-2]}},
    "search": {"algorithm": "tpe", "n_startup_trials": 3},
    "budget": {"trials": 6},
}


def statuses(folder: Path) -> list[str]:
    return [json.loads(f.read_text())["status"] for f in folder.glob("trials/*/run.json")]


@pytest.mark.slow
def test_campaign_resumes_after_sigkill_without_lost_or_repeated_trials(tmp_path):
    written(tmp_path, **LONG)
    process = start_advtrain("tune", "small.yaml", cwd=tmp_path)
    wait_for(
        lambda: sum(s == "finished" for f in (tmp_path / "runs").glob("small-*") for s in statuses(f)) >= 2,
        "two",
    )
    (folder,) = (tmp_path / "runs").glob("small-*")
    half = [RunFolder(f.parent) for f in folder.glob("trials/*/run.json") if '"running"' in f.read_text()]
    wait_for(lambda: all(len(run.metrics()) >= 2 for run in half), "epochs of the running ones")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {
        f.parent: f.read_bytes()
        for f in folder.glob("trials/*/metrics.jsonl")
        if len(f.read_bytes().splitlines()) == 12
    }
    begun = {run.path: run.metrics() for run in half}
    again = advtrain("tune", "--resume", folder.name, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert statuses(folder) == ["finished"] * 6
    assert {path: (path / "metrics.jsonl").read_bytes() for path in done} == done
    for path, lines in begun.items():  # epochs before the kill are not trained again
        assert RunFolder(path).metrics()[: len(lines)] == lines

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert sorted(r.info.status for r in runs) == ["FINISHED"] * 7
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert {len(client.get_metric_history(r.info.run_id, "train/loss")) for r in children} == {12}
    more = advtrain("tune", "--resume", folder.name, "--trials", "7", "--prefer", "clean=0.5", cwd=tmp_path)
    assert more.returncode == 0, more.stdout + more.stderr
    assert statuses(folder) == ["finished"] * 7
    assert {path: (path / "metrics.jsonl").read_bytes() for path in done} == done


@pytest.mark.slow
def test_killed_trial_resumes_from_checkpoint(tmp_path):
    written(tmp_path, **LONG | {"budget": {"trials": 3}, "max_failures": 1})
    process = start_advtrain("tune", "small.yaml", cwd=tmp_path)
    first = tmp_path / "runs"
    wait_for(lambda: list(first.glob("small-*/trials/*-t000/progress.json")) != [], "the first trial")
    (run,) = (RunFolder(path) for path in first.glob("small-*/trials/*-t000"))
    wait_for(lambda: len(run.metrics()) >= 3, "three epochs")
    lines = run.metrics()[:3]
    os.kill(run.progress()["pid"], signal.SIGKILL)
    assert process.wait(timeout=200) == 0, (tmp_path / "output.txt").read_text()
    assert run.metrics()[:3] == lines
    assert len(run.metrics()) == 12
    (folder,) = first.glob("small-*")
    assert statuses(folder) == ["finished"] * 3


@pytest.mark.study
@pytest.mark.slow
def test_two_concurrent_campaigns_share_new_store(tmp_path):
    small = {"space": {"optimizer.lr": {"loguniform": [1e-3, 1e-2]}}, "search": {"algorithm": "random"}}
    written(tmp_path, **small | {"budget": {"trials": 6}})
    (tmp_path / "other.yaml").write_text((tmp_path / "small.yaml").read_text())
    processes = []
    for name in ("small.yaml", "other.yaml"):
        processes.append(start_advtrain("tune", name, cwd=tmp_path))
    assert [p.wait(timeout=400) for p in processes] == [0, 0], (tmp_path / "output.txt").read_text()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert len(runs) == 14
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags:
            assert len(client.get_metric_history(run.info.run_id, "val/robust_accuracy")) == 3
    assert sorted(v.version for v in client.search_model_versions("name = 'digits'")) == [1, 2]


@pytest.mark.study
@pytest.mark.slow
def test_search_over_epsilon_does_not_prefer_small_values(tmp_path):
    """All trials are evaluated at 0.1, so that a trial trained at 0.01 does not look robust."""
    base = CAMPAIGN["base"] | {"training.epochs": 8, "optimizer.lr": 0.005}
    space = {"adversary.eps": {"choice": [0.0, 0.01, 0.05, 0.1]}}
    one = {"objectives": {"robust_accuracy": "max"}, "budget": {"trials": 4}}
    written(tmp_path, base=base, space=space, **one)
    done = advtrain("tune", "small.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "runs").glob("small-*/report/trials.json")
    robust = {
        t["settings"]["adversary.eps"]: t["best"]["robust_accuracy"] for t in json.loads(file.read_text())
    }
    assert robust[0.1] > robust[0.01] + 0.1 > robust[0.0]
    assert robust[0.1] == max(robust.values())


@pytest.mark.slow
def test_stopped_or_killed_two_worker_trial_releases_placement_group(tmp_path):
    """Runs without Ray's dashboard, where placement groups could be orphaned."""
    base = CAMPAIGN["base"] | {"training.num_workers": 2, "training.cpus_per_worker": 1, "training.epochs": 6}
    space = {"optimizer.lr": {"choice": [0.01, 1e-6, 1e-5]}}
    asha = {
        "scheduler": {"kind": "asha", "grace_period": 1, "reduction_factor": 2},
        "objectives": {"robust_accuracy": "max"},
    }
    written(tmp_path, base=base, space=space, max_failures=2, **asha)
    process = start_advtrain("tune", "small.yaml", cwd=tmp_path)
    trials = tmp_path / "runs"
    wait_for(
        lambda: list(trials.glob("small-*/trials/*-t000/metrics.jsonl")) != [], "an epoch of the first trial"
    )
    group = next(trials.glob("small-*/trials/*-t000")) / "ray" / "placement-group"
    assert group.exists()
    # The process that runs the trial holds its lock.
    lock = os.stat(next(trials.glob("small-*/trials/*-t000")) / "lock").st_ino
    (holder,) = {
        int(line.split()[4]) for line in Path("/proc/locks").read_text().splitlines() if f":{lock} " in line
    }
    os.kill(holder, signal.SIGKILL)
    assert process.wait(timeout=400) == 0, (tmp_path / "output.txt").read_text()
    (folder,) = trials.glob("small-*")
    ended = {t["trial"]: t for t in json.loads((folder / "report" / "trials.json").read_text())}
    assert ended["t000"]["status"] == "finished"
    assert ended["t000"]["epochs"] == 6
    assert (ended["t001"]["status"], ended["t002"]["status"]) == ("stopped", "stopped")
    assert not list(folder.glob("trials/*/ray/placement-group"))


@pytest.mark.slow
def test_pbt_recipe_reproduces_trial_weights(ray_cluster, store, tmp_path):
    space = {
        "optimizer.lr": {"loguniform": [1e-4, 2e-2]},
        "optimizer.beta2": {"one_minus_loguniform": [1e-3, 1e-1]},
    }
    base = CAMPAIGN["base"] | {"training.epochs": 7}
    changes = {"search": {"algorithm": "pbt", "interval": 2}, "scheduler": {}, "budget": {"trials": 5}}
    one = {"objectives": {"robust_accuracy": "max"}, "register": {"top": 0}}
    plan = load(written(tmp_path, base=base, space=space, **changes, **one))
    assert tune(plan, workspace(tmp_path, store), None) == 0
    (folder,) = (tmp_path / "runs").glob("small-*")
    ledger = Ledger.find(tmp_path / "runs", folder.name, {})
    assert [t.status for t in ledger.trials] == ["finished"] * 5
    recipes = [(t, load_recipe(t.run.path / "recipe.yaml")) for t in ledger.trials]
    changed = [(t, recipe) for t, recipe in recipes if recipe.training.changes]
    assert changed, "nobody took over another's weights"
    trial, recipe = changed[-1]
    replay = RunFolder.create(
        tmp_path / "replay", "digits", recipe.digest(), recipe.to_yaml(), {"status": "running"}
    )
    assert run_worker(recipe, digits_data(recipe), replay, Session()).status == "finished"
    mine, theirs = (best_checkpoint(run.checkpoints) for run in (replay, trial.run))
    assert mine.step == theirs.step
    assert all((mine.model[k] == v).all() for k, v in theirs.model.items())
    assert "set/optimizer.lr" in trial.run.metrics()[-1]


@pytest.mark.slow
def test_ctrl_c_stops_campaign_and_prints_resume_command(tmp_path):
    written(tmp_path, **LONG)
    process = start_advtrain("tune", "small.yaml", cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "runs").glob("small-*/trials/*/metrics.jsonl")) != [], "an epoch")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - started < 30
    (folder,) = (tmp_path / "runs").glob("small-*")
    output = (tmp_path / "output.txt").read_text()
    assert f"`advtrain tune --resume {folder.name}` resumes it" in output
    assert "Traceback" not in output
    assert json.loads((folder / "campaign.json").read_text())["status"] == "stopped"
