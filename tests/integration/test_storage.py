"""Runs in S3: killed, resumed from an empty machine, tuned; no credential in any output."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from advtrain.data import load_data
from advtrain.recipe import load_recipe
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.storage import connect
from advtrain.training import launch
from tests.cluster_kit import TOKEN, ray_cluster
from tests.kit import RECIPES, advtrain, start_advtrain, wait_for, write_texts
from tests.servers import s3

SMALL = ["training.epochs=6", "training.checkpoint_steps=5", "evaluation.suite=null"]
SMALL += ["evaluation.attack={num_steps: 5}", "evaluation.validation.num_steps=5"]
FLAGS = [word for setting in SMALL for word in ("--set", setting)]
RUNS = "s3://advtrain/runs"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with s3(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield env


def paths() -> list[str]:
    """Return the path below RUNS of every object in the store."""
    store, root = connect(RUNS)
    found = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return [each.path[len(root) + 1 :] for each in found if each.type == fs.FileType.File]


def objects() -> dict[str, bytes]:
    """Return {path below RUNS: content} of every object in the store."""
    store, root = connect(RUNS)
    content = {}
    for path in paths():
        # a worker that is still alive after a killed command deletes old checkpoints
        with suppress(FileNotFoundError):
            content[path] = store.open_input_stream(f"{root}/{path}").read()
    return content


def copied(folder: Path) -> Path:
    for name, content in objects().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def last_state(run: RunFolder):
    return load_checkpoint(sorted(run.checkpoints.glob("step-*"))[-1])


@pytest.mark.slow
def test_resume_from_s3_after_sigkill_is_bit_identical(tmp_path, bucket):
    whole = tmp_path / "whole"
    whole.mkdir()
    done = advtrain("train", "digits", "--workers", "0", *FLAGS, cwd=whole)
    assert done.returncode == 0, done.stderr
    command = ["train", "digits", "--workers", "0", "--runs", RUNS, *FLAGS]
    process = start_advtrain(*command, "--set", "adversary.num_steps=7", cwd=tmp_path)
    wait_for(
        lambda: any("step-" in name and name.endswith("state.json") for name in objects()), "a checkpoint"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = {path.split("/")[0] for path in objects()}
    done = advtrain("train", "--resume", name, "--runs", RUNS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {RUNS}/{name}/report/report.html" in done.stdout
    mine = RunFolder(copied(tmp_path / "copy") / name)
    reference = RunFolder(next((whole / "runs").iterdir()))
    one, other = last_state(mine), last_state(reference)
    assert one.step == other.step == 126
    assert all(torch.equal(one.model[key], value) for key, value in other.model.items())
    assert [line["epoch"] for line in mine.metrics()] == [1, 2, 3, 4, 5, 6]
    assert len(list(mine.checkpoints.glob("step-*/state.json"))) <= 3  # S3 is pruned too
    assert mine.facts()["status"] == "finished"
    again = advtrain("train", "--resume", name, "--runs", RUNS, cwd=tmp_path)
    assert "finished; nothing to do" in again.stdout
    judged = advtrain("evaluate", name, "--runs", RUNS, "--suite", "quick", "--limit", "50", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert any("/evaluations/" in path and path.endswith("units.jsonl") for path in objects())


@pytest.mark.study
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_sharded_transformer_of_texts_resumes_from_s3_after_sigkill(tmp_path, bucket):
    """Two Ray workers with FSDP; batches of similar length, random starts and dropout are equal bit for bit."""
    settings = [
        f"data={{source: text, path: {write_texts(tmp_path / 'texts.txt', 60)}, group_by_length: true}}",
        "model={name: transformer, args: {dim: 16, heads: 2, depth: 1}}",
        "adversary={name: pgd, norm: l2, eps: 0.5, num_steps: 3}",
        "training={epochs: 5, batch_size: 4, num_workers: 2, cpus_per_worker: 1, sharding: fsdp}",
        "training.checkpoint_steps=4",
        "evaluation.attack={num_steps: 2, num_restarts: 1}",
    ]
    command = ["train", "trec", *(word for setting in settings for word in ("--set", setting))]
    process = start_advtrain(*command, "--runs", RUNS, cwd=tmp_path)
    # an epoch has 11 steps, so the checkpoint is one in mid-epoch
    wait_for(lambda: any("step-00000004/state.json" in path for path in paths()), "a checkpoint", 400)
    process.kill()
    process.wait()
    (name,) = {path.split("/")[0] for path in paths()}
    assert not any("step-00000055" in path for path in paths()), "the run had finished before the kill"
    done = advtrain("train", "--resume", name, "--runs", RUNS, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = load_recipe(RECIPES / "trec.yaml", settings)
    facts = {"status": "running"}
    whole = RunFolder.create(tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), facts)
    assert launch(recipe, load_data(recipe.data, tmp_path), whole).status == "finished"
    one, other = last_state(RunFolder(copied(tmp_path / "copy") / name)), last_state(whole)
    assert one.step == other.step == 55
    for part in ("model", "optimizer"):
        assert all(torch.equal(getattr(one, part)[k], v) for k, v in getattr(other, part).items()), part


def test_missing_bucket_is_reported_in_one_line(tmp_path, bucket):
    done = advtrain("train", "digits", "--runs", "s3://nowhere/runs", cwd=tmp_path)
    assert done.returncode == 2
    assert "s3://nowhere/runs cannot be used: there is no bucket 'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.study
@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_rebuild_from_same_checkpoint_when_settings_change(tmp_path, bucket):
    """When settings change, each rank reads the checkpoint of rank 0, in S3 as in a folder."""
    changes = "training.changes=[{epoch: 2, settings: {optimizer.lr: 0.001}}]"
    command = ["train", "digits", "--workers", "2", *FLAGS, "--set", changes]
    for words in ([], ["--runs", RUNS]):
        done = advtrain(*command, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    (name,) = {path.split("/")[0] for path in objects()}
    mine, reference = copied(tmp_path / "copy") / name, tmp_path / "runs" / name
    one, other = last_state(RunFolder(mine)), last_state(RunFolder(reference))
    assert one.step == other.step == 126
    assert all(torch.equal(one.model[key], value) for key, value in other.model.items())


@pytest.mark.slow
@pytest.mark.ray
def test_campaign_resumes_from_s3_after_sigkill(tmp_path, bucket):
    command = ["tune", "digits_quick", "--runs", RUNS, "--trials", "6"]
    process = start_advtrain(*command, cwd=tmp_path)
    wait_for(lambda: sum(path.endswith("metrics.jsonl") for path in objects()) >= 2, "two trials", 180)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    name = next(path.split("/")[0] for path in objects())
    before = {path for path in objects() if path.endswith("run.json")}
    done = advtrain("tune", "--resume", name, "--runs", RUNS, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 trials: " in done.stdout
    after = {path for path in objects() if path.endswith("run.json")}
    assert before <= after
    assert len([path for path in after if "/trials/" in path]) == 6
    assert f"report: {RUNS}/{name}/report/report.html" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_credentials_are_not_written_to_any_output(tmp_path, bucket):
    """Checks every object, database, artifact, parameter, tag and output, and Ray's logs."""
    planted = {
        "AWS_SECRET_ACCESS_KEY": "PLANTED-aws-secret-5d1f",
        "AWS_SESSION_TOKEN": "PLANTED-aws-session-77aa",
        "MLFLOW_TRACKING_PASSWORD": "PLANTED-mlflow-9c3e",
        "GRAFANA_PASSWORD": "PLANTED-grafana-01bd",
    }
    env = bucket | planted
    with ray_cluster(tmp_path, nodes=2, env=env) as cluster:
        words = ["--runs", RUNS, "--address", cluster.address]
        done = advtrain("train", "digits", *words, "--workers", "2", *FLAGS, cwd=tmp_path, env=env | TOKEN)
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / "train.out").write_text(done.stdout + done.stderr)
        done = advtrain("tune", "digits_quick", *words, "--trials", "2", cwd=tmp_path, env=env | TOKEN)
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / "tune.out").write_text(done.stdout + done.stderr)
        logs = list(Path(cluster.temporary).glob("session_*/logs/**/*"))
        assert len(logs) > 10
        files = [p for p in [*tmp_path.rglob("*"), *logs] if p.is_file()]
        assert any(p.name == "mlflow.db" for p in files)
        contents = {str(p): p.read_bytes() for p in files} | objects()
    assert any(path.endswith("run.json") for path in contents)
    for name, secret in (planted | {"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"]}).items():
        holders = [path for path, content in contents.items() if secret.encode() in content]
        assert not holders, f"{name} is in {holders}"
