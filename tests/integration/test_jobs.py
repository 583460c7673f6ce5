"""Jobs on a real Ray head: one job per command, its logs, a stop with a checkpoint, and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from advtrain.errors import UserError
from advtrain.runs.folder import idempotent_start
from pipelines import submit as jobs
from pipelines.cli.cluster import check_command
from pipelines.cli.main import app  # noqa: F401 (it defines all commands)
from tests.kit import ROOT, user_environment, wait_for
from tests.servers import answers, free_port

BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


def test_submission_id_is_deterministic_and_unique_per_command():
    words = ["train", "digits", "--set", "seed=1"]
    assert jobs.submission_id(words) == jobs.submission_id(list(words))
    assert jobs.submission_id(words).startswith("advtrain-train-digits-")
    others = [["train", "digits"], [*words, "--workers", "2"], ["tune", "digits"]]
    assert len({jobs.submission_id(w) for w in [words, *others]} | {jobs.submission_id(words, "b")}) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "digits"], "submit takes train"),
        (["doctor"], "submit takes train"),
        ([], "submit takes train"),
        (["train", "digits", "--wrokers", "2"], "No such option"),
        (["train", "digits", "--workers", "two"], "valid integer"),
        (["promote"], "Missing argument"),
    ],
)
def test_submit_rejects_invalid_command_before_connecting(words, message):
    with pytest.raises(UserError, match=message):
        jobs.submit(check_command(words), "http://127.0.0.1:1")


def test_submit_rejects_job_without_shared_storage(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="shared folder or an object store with --runs"):
        jobs.check_shared_folders(["train", "digits"])
    with pytest.raises(UserError, match="MLflow server"):
        jobs.check_shared_folders(["train", "digits", "--runs", "/mnt/runs"])
    with pytest.raises(UserError, match="MLflow server"):
        jobs.check_shared_folders(
            ["train", "digits", "--runs=/mnt/runs", "--tracking-uri", "sqlite:///mlflow.db"]
        )
    for runs in ("/mnt/runs", "s3://bucket/runs"):
        jobs.check_shared_folders(
            ["train", "digits", f"--runs={runs}", "--tracking-uri", "http://mlflow:5000"]
        )


def test_submit_passes_no_secret_to_job(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert "hunter2" not in json.dumps(jobs.passed_on())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    with pytest.raises(UserError, match="holds a password") as error:
        jobs.passed_on()
    assert "hunter2" not in str(error.value)


def test_submit_rejects_large_working_tree_and_names_largest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no git checkout"):
        jobs.working_tree()
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / "data").mkdir()
    for name, megabytes in (("data/large.bin", 300), ("small.bin", 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 1_000_000)
    assert jobs.working_tree() == tmp_path
    with (tmp_path / "forgotten.bin").open("wb") as file:
        file.truncate(150_000_000)
    with pytest.raises(UserError, match=r"151 MB.*forgotten.bin \(150 MB\)"):
        jobs.working_tree()


def test_jobs_error_names_unreachable_cluster(monkeypatch):
    port = free_port()
    with pytest.raises(UserError, match=f"cluster at http://127.0.0.1:{port}"):
        jobs.jobs(f"http://127.0.0.1:{port}")


def test_idempotent_start_finds_run_started_under_same_key(tmp_path):
    with idempotent_start(tmp_path, "key", "run.json") as begun:
        assert begun is None
        (tmp_path / "run-1").mkdir()
        (tmp_path / "run-1" / "run.json").write_text(json.dumps({"once": "key"}))
        (tmp_path / "run-2").mkdir()
        (tmp_path / "run-2" / "run.json").write_text("{")
    with idempotent_start(tmp_path, "key", "run.json") as begun:
        assert begun == "run-1"
    with idempotent_start(tmp_path, "other", "run.json") as begun:
        assert begun is None
    with idempotent_start(tmp_path, None, "run.json") as begun:
        assert begun is None


@dataclass(frozen=True)
class Cluster:
    """A Ray head on this machine."""

    url: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def cluster():
    gcs, dashboard = free_port(), free_port()
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = user_environment({"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **TOKEN})
    env.pop("PYTHONPATH")  # the job must run the uploaded code
    command = [
        "ray",
        "start",
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        "--num-cpus=3",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={tempfile.mkdtemp(prefix='ray-', dir='/tmp')}",  # short, because it contains sockets
        f"--dashboard-agent-listen-port={free_port()}",  # another Ray may use the default port
    ]
    head = subprocess.Popen(
        [*command, "--dashboard-host=127.0.0.1"],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: answers(f"{url}/api/version"), "Ray's dashboard", 120)
        yield Cluster(url, env)
    finally:
        head.terminate()
        head.wait(60)


def advtrain(
    cluster: Cluster, *words: str, token: dict[str, str] = TOKEN
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *words, "--address", cluster.url]
    return subprocess.run(
        command, cwd=ROOT, env=user_environment(token), capture_output=True, text=True, timeout=300
    )


def the_run(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("digits-*")
    return found


def epochs(folder: Path) -> int:
    found = list((folder / "runs").glob("digits-*/metrics.jsonl"))
    return len(found[0].read_text().splitlines()) if found else 0


def train_words(folder: Path, num_epochs: int) -> list[str]:
    words = ["train", "digits", "--workers", "1", "--runs", str(folder / "runs")]
    words += ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return [*words, "--set", f"training.epochs={num_epochs}", "--set", "evaluation.suite=quick"]


@pytest.mark.slow
def test_job_is_submitted_once_stopped_and_resumed(cluster, tmp_path):
    words = train_words(tmp_path, 300)
    job = jobs.submission_id(words)
    first = advtrain(cluster, "submit", *words)
    assert first.returncode == 0, first.stderr
    assert job in first.stdout
    wait_for(lambda: epochs(tmp_path) >= 3, "three epochs", 180)
    second = advtrain(cluster, "submit", *words)
    assert second.returncode == 0, second.stderr
    assert f"job {job} is running already" in second.stdout
    stopped = advtrain(cluster, "stop", job)
    assert stopped.returncode == 0, stopped.stderr
    facts = json.loads((the_run(tmp_path) / "run.json").read_text())
    assert facts["status"] == "stopped", "a checkpoint is saved before the end"
    done = epochs(tmp_path)
    listed = advtrain(cluster, "jobs")
    assert job in "".join(listed.stdout.split())
    assert "stopped" in listed.stdout
    # The same command resumes the same run and the same MLflow run.
    tracked = json.loads((the_run(tmp_path) / "tracking.json").read_text())["run_id"]
    assert advtrain(cluster, "submit", *words).returncode == 0
    wait_for(lambda: epochs(tmp_path) >= done + 2, "further epochs", 180)
    assert json.loads((the_run(tmp_path) / "tracking.json").read_text())["run_id"] == tracked
    assert advtrain(cluster, "stop", job).returncode == 0


@pytest.mark.slow
def test_submit_follow_streams_logs_and_returns_exit_code(cluster, tmp_path):
    words = train_words(tmp_path, 2)
    done = advtrain(cluster, "submit", *words, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2" in done.stdout
    assert "succeeded" in done.stdout
    again = advtrain(cluster, "submit", *words, "--follow")
    assert again.returncode == 0
    assert "has succeeded already" in again.stdout
    failing = advtrain(cluster, "submit", *words, "--set", "model.name=cnn9", "--follow")
    assert failing.returncode == 1
    assert "cnn9" in failing.stdout
    unknown = advtrain(cluster, "stop", "advtrain-train-digits-0000000000")
    assert unknown.returncode == 2
    assert "no job" in unknown.stderr


@pytest.mark.slow
def test_jobs_rejects_invalid_cluster_token(cluster):
    refused = advtrain(cluster, "jobs", token={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64})
    assert refused.returncode == 2
    assert "uthenticat" in refused.stderr
    assert "Traceback" not in refused.stderr
