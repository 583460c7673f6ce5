"""Jobs on a real Ray head: one job per command, its logs, a stop with a checkpoint, and a resume."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from ray._private.runtime_env.packaging import create_package

from advtrain import cluster as cluster_module
from advtrain.errors import UserError
from advtrain.events import Message, Output
from advtrain.runs.folder import idempotent_start
from pipelines import jobs_client
from pipelines import submit as jobs
from pipelines.cli.cluster import check_command
from pipelines.cli.main import app  # noqa: F401 (it defines all commands)
from pipelines.job_command import (
    entrypoint,
    find_problems,
    missing_data,
    missing_weights,
    runtime_env,
    with_runs,
)
from pipelines.jobs_client import VARIABLES
from pipelines.upload import uploaded_files
from tests.kit import ROOT, run_here, unset, user_environment, wait_for, write_texts
from tests.kit import advtrain as run_advtrain
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
        (["models"], "submit takes train"),
        ([], "submit takes train"),
        (["train", "digits", "--wrokers", "2"], "No such option"),
        (["train", "digits", "--workers", "two"], "valid integer"),
        (["promote"], "Missing argument"),
    ],
)
def test_submit_rejects_invalid_command_before_connecting(words, message):
    with pytest.raises(UserError, match=message):
        jobs.submit(check_command(words), "http://127.0.0.1:1")


def problems(*words: str) -> str:
    return "\n".join(find_problems(with_runs(words)))


def test_submit_rejects_job_without_shared_storage(monkeypatch):
    unset(monkeypatch, "MLFLOW_TRACKING_URI", "ADVTRAIN_RUNS")
    runs, store = "shared folder or an object store with --runs", "MLflow server"
    assert runs in problems("train", "digits")
    assert runs in problems("train", "digits", "--runs", "runs")
    assert store in problems("train", "digits", "--runs", "/mnt/runs")
    assert store in problems("train", "digits", "--runs=/mnt/runs", "--tracking-uri", "sqlite:///mlflow.db")
    for folder in ("/mnt/runs", "s3://bucket/runs"):
        assert not problems("train", "digits", f"--runs={folder}", "--tracking-uri", "http://mlflow:5000")


def test_submit_names_all_that_is_missing_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unset(monkeypatch, "MLFLOW_TRACKING_URI", "ADVTRAIN_RUNS", "ADVTRAIN_DATA_ROOT")
    with pytest.raises(UserError, match="the job lacks 4 things") as error:
        jobs.submit(["train", "digits"], f"http://127.0.0.1:{free_port()}")
    for option in ("--runs", "--tracking-uri", "--working-dir", "--address"):
        assert option in str(error.value)
    assert "Connection refused; set --address" in str(error.value)


def test_submit_takes_the_runs_folder_of_the_environment(monkeypatch):
    unset(monkeypatch, "ADVTRAIN_RUNS")
    words = ["train", "digits"]
    assert with_runs(words) == words
    monkeypatch.setenv("BUCKET", "models")
    monkeypatch.setenv("ADVTRAIN_RUNS", "s3://$BUCKET/runs")
    assert with_runs(words) == [*words, "--runs", "s3://models/runs"]
    assert with_runs([*words, "--runs=/mnt/runs"]) == [*words, "--runs=/mnt/runs"]
    assert with_runs(["predict", "models:/digits/1"]) == ["predict", "models:/digits/1"]
    assert jobs.submission_id(with_runs(words)) != jobs.submission_id(words)
    monkeypatch.setenv("ADVTRAIN_RUNS", "runs")
    assert "(got 'runs')" in problems(*words)


@pytest.mark.parametrize(
    ("words", "sent", "place"),
    [
        ("train digits", "", ""),
        ("train cifar10", "", "data"),
        ("train --workers 2 cifar10", "", "data"),
        ("train digits --set data.source=cifar10", "", "data"),
        ("train cifar10 --set=data.download=True", "", ""),
        ("train cifar10", "database.py", "data"),
        ("train cifar10", "data/cifar-10-batches-py/meta", ""),
        ("train cifar10 --data-root .", "", ""),
        ("train imagenet_folder", "", "data/imagenet"),
        ("train imagenet_folder", "data/imagenet/train/a/0.png", ""),
        ("train imagenet_folder --set data.path=/mnt/imagenet", "", ""),
        ("train imagenet_folder --set data.path=$DATA/imagenet", "", ""),
        ("train own.yaml", "own.yaml", ""),
        ("train --resume cifar10-abcdef-1", "", ""),
        ("tune cifar10", "", ""),
    ],
)
def test_submit_warns_of_data_that_is_not_sent(words, sent, place, tmp_path):
    env = {"working_dir": str(tmp_path), "env_vars": {}}
    if sent:
        (tmp_path / sent).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / sent).write_text("not: a recipe")
    found = missing_data(words.split(), env)
    assert (f"'{place}' is not sent" in found) == bool(found) == bool(place)
    assert missing_data(words.split(), env | {"env_vars": {"ADVTRAIN_DATA_ROOT": "/mnt"}}) == ""


@pytest.mark.parametrize(
    ("words", "sent", "is_missing"),
    [
        ("train digits --set model.from=w.pth", "", True),
        ("train digits --set model.from=./w.pth", "w.pth", False),
        ("train digits --set model.from=/mnt/w.pth", "", False),
        ("train digits --set model.from=$WEIGHTS/w.pth", "", False),
        ("train digits --set model.from=models:/digits/1", "", False),
        ("train digits", "", False),
        ("tune digits --set model.from=w.pth", "", False),
    ],
)
def test_submit_warns_of_weights_that_are_not_sent(words, sent, is_missing, tmp_path):
    if sent:
        (tmp_path / sent).write_text("tensors")
    found = missing_weights(words.split(), {"working_dir": str(tmp_path), "env_vars": {}})
    assert ("model.from 'w.pth' is not sent with the job" in found) == bool(found) == is_missing


def test_submit_passes_no_secret_to_job(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    sent = runtime_env(Path("tree"))
    assert sent["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "hunter2" not in json.dumps(sent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    found = problems("train", "digits", "--runs", "/mnt/runs")
    assert "$MLFLOW_TRACKING_URI holds a password" in found
    assert "hunter2" not in found


def test_submit_takes_settings_of_a_runtime_environment(tmp_path):
    file = tmp_path / "env.yaml"
    file.write_text("pip: [advtrain]\nenv_vars: {A: 4, PYTHONUNBUFFERED: '0'}\n")
    sent = runtime_env(Path("tree"), file)
    assert (sent["pip"], sent["working_dir"]) == (["advtrain"], "tree")
    assert (sent["env_vars"]["A"], sent["env_vars"]["PYTHONUNBUFFERED"]) == ("4", "1")
    for text, message in (
        ("working_dir: .", "--working-dir"),
        ("[pip]", "is a map"),
        ("pip: 3", "must be of type"),
        ("env_vars: [A=1]", "must be of type"),
        ("env_vars: {A: true}", "must be of type"),
        ("env_vars: {MLFLOW_TRACKING_PASSWORD: x}", "env_vars.MLFLOW_TRACKING_PASSWORD looks like a secret"),
        ("env_vars: {WANDB_API_KEY: x}", "env_vars.WANDB_API_KEY looks like a secret"),
        ("env_vars: {A: 'https://me:x@host'}", "env_vars.A holds a password"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            runtime_env(Path("tree"), file)


def test_submit_rejects_large_working_tree_and_names_largest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no git checkout; name the folder to send with --working-dir"):
        jobs.working_tree()
    assert jobs.working_tree(tmp_path) == tmp_path
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / "data").mkdir()
    for name, megabytes in (("data/large.bin", 300), ("small.bin", 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 1_000_000)
    assert jobs.working_tree() == tmp_path
    with (tmp_path / "forgotten.bin").open("wb") as file:
        file.truncate(150_000_000)
    for folder in (None, tmp_path):
        with pytest.raises(UserError, match=r"151 MB.*forgotten.bin \(150 MB\)"):
            jobs.working_tree(folder)
    (tmp_path / "forgotten.bin").rename(tmp_path / "data" / "forgotten.bin")
    (tmp_path / ".gitignore").unlink()
    with pytest.raises(UserError, match=r"451 MB.*data/ \(450 MB\), small.bin"):
        jobs.working_tree()


def test_working_tree_is_what_ray_uploads(tmp_path):
    names = [
        ".gitignore",
        "a.py",
        "b/c.py",
        "b/.rayignore",
        "b/d.log",
        "runs/x",
        ".git/HEAD",
        "b/__pycache__/c.pyc",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "b" / ".rayignore").write_text("*.log\n")
    excludes = [".git", ".venv", "venv", "__pycache__"]
    create_package(str(tmp_path), tmp_path.with_suffix(".zip"), include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path.with_suffix(".zip")) as package:
        sent = {name for name in package.namelist() if not name.endswith("/")}
    assert set(uploaded_files(tmp_path)) == sent == {".gitignore", "a.py", "b/c.py", "b/.rayignore"}


@pytest.mark.parametrize(
    ("given", "variables", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://b:8265/"}, "http://b:8265"),
        (None, {"RAY_ADDRESS": "local"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://b:8265", "RAY_API_SERVER_ADDRESS": "https://c"}, "https://c"),
        (
            "http://a:8265",
            {"RAY_ADDRESS": "http://b:8265", "RAY_API_SERVER_ADDRESS": "https://c"},
            "http://a:8265",
        ),
        (None, {"RAY_ADDRESS": "b:6379"}, "http://dashboard of b:6379"),
        ("auto", {"RAY_ADDRESS": "http://b:8265"}, "http://dashboard of auto"),
    ],
)
def test_address_of_the_dashboard_has_one_order(given, variables, address, monkeypatch):
    unset(monkeypatch, *VARIABLES)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs_client, "_dashboard_of", lambda _, head: f"http://dashboard of {head}")
    assert jobs_client.jobs_address(given) == address


@pytest.mark.parametrize("words", [["jobs"], ["jobs", "x"], ["stop", "x"], ["submit", "train", "digits"]])
def test_jobs_commands_read_the_same_variables(words, monkeypatch, capsys, tmp_path):
    unset(monkeypatch, *VARIABLES)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setenv("ADVTRAIN_RUNS", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    if words[0] == "submit":
        words = [*words, "--working-dir", str(tmp_path)]
    assert run_here(*words) == 2
    assert "$RAY_ADDRESS 'ray://head:10001' has no Jobs API; set --address" in capsys.readouterr().err


class Dashboard(BaseHTTPRequestHandler):
    """Dashboard of a cluster without jobs."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]" if self.path == "/api/jobs/" else b'{"ray_version": "2.60.0"}')

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_address_option_takes_precedence_in_rays_client(monkeypatch):
    """Ray's client prefers both variables to its argument."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert jobs.jobs(url) == []
    server.shutdown()
    server.server_close()
    assert [os.environ[name] for name in VARIABLES] == ["http://127.0.0.1:1"] * 2


def test_jobs_error_names_unreachable_cluster(monkeypatch):
    port = free_port()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=f"cluster at http://127.0.0.1:{port}"):
        jobs.jobs(f"http://127.0.0.1:{port}")
    monkeypatch.setattr(cluster_module, "ANSWER_S", 0.2)
    with pytest.raises(UserError, match=rf"--address '127.0.0.1:{port}': .*begins with http://"):
        jobs.jobs(f"127.0.0.1:{port}")


def test_job_output_begins_at_the_latest_start():
    old = "Runtime env is setting up.\nRunning entrypoint for job a: x\nepoch 1/9\n"
    new = "Runtime env is setting up.\nRunning entrypoint for job a: x\nepoch 2/9\nepoch 3/9\n"
    for size in (1, 7, 1000):
        output = jobs.JobOutput(len(old))
        parts = [(old + new)[i : i + size] for i in range(0, len(old + new), size)]
        assert "".join(output(part) for part in parts) == "epoch 2/9\nepoch 3/9\n"
    failed = jobs.JobOutput(len(old))
    assert failed(old + "Failed to set up the runtime env.\n") == ""
    assert failed.rest == "Failed to set up the runtime env.\n"


class FakeClient:
    """Client of a job that has these states in turn: status, Ray's message, and log."""

    def __init__(self, *states: tuple[str, str, str]) -> None:
        self.states = list(states)

    def get_job_info(self, job: str) -> SimpleNamespace:
        if len(self.states) > 1:
            self.states.pop(0)
        status, message, _ = self.states[0]
        return SimpleNamespace(status=SimpleNamespace(value=status), message=message)

    def get_job_status(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.states[0][0])

    def get_job_logs(self, job: str) -> str:
        return self.states[0][2]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield self.states[0][2]


SETUP, COMMAND = "Runtime env is setting up.\n", "Running entrypoint for job a: x\n"


@pytest.mark.parametrize(
    ("states", "status", "reported"),
    [
        (
            [
                ("PENDING", "no resources", ""),
                ("RUNNING", "", COMMAND),
                ("RUNNING", "", f"{COMMAND}data digits\n"),
            ],
            "RUNNING",
            ["job a is pending: no resources", "job a is running"],
        ),
        (
            [("RUNNING", "", COMMAND), ("FAILED", "exit code 2, ...", f"{COMMAND}error: no data\n")],
            "FAILED",
            ["error: no data\n", "job a: failed"],
        ),
        (
            [
                ("RUNNING", "", f"{COMMAND}data\n"),
                ("FAILED", "exit code 2, ...", f"{COMMAND}data\nno model\n"),
            ],
            "FAILED",
            ["data\nno model\n", "job a: failed"],
        ),
        ([("FAILED", "no pip", SETUP)], "FAILED", [SETUP, "job a: failed: no pip"]),
        ([("SUCCEEDED", "", COMMAND)], "SUCCEEDED", ["job a: succeeded"]),
        ([("RUNNING", "", COMMAND)], "RUNNING", ["job a is running, without output for 0 s"]),
    ],
)
def test_submit_waits_for_first_output_or_end(states, status, reported, monkeypatch):
    old = f"{SETUP}{COMMAND}epoch 7/9\n"
    client = FakeClient(("PENDING", "", old), *((status, why, old + log) for status, why, log in states))
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    monkeypatch.setattr(jobs, "GRACE_S", 0.1)
    monkeypatch.setattr(jobs, "START_S", 30.0 if len(states) > 1 else 0.0)
    events: list[Message | Output] = []
    assert jobs._await_start(client, "a", len(old), events.append) == status
    assert [event.text for event in events] == reported


def test_followed_job_shows_why_it_is_pending(monkeypatch):
    text = f"{SETUP}{COMMAND}epoch 1/9\n"
    states = [("PENDING", "", ""), ("PENDING", "", ""), ("PENDING", "no pip", ""), ("PENDING", "no pip", "")]
    client = FakeClient(*states, ("RUNNING", "", text), ("SUCCEEDED", "", text))
    monkeypatch.setattr(jobs, "connect", lambda _: client)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    events: list[Message | Output] = []
    assert jobs.follow_job("a", "http://head:8265", progress=events.append).status == "succeeded"
    assert [event.text for event in events] == ["job a is pending: no pip", "epoch 1/9\n", "job a: succeeded"]


@pytest.mark.parametrize("candidates", [("python",), ("python", "python3"), ()])
def test_job_runs_the_first_python_that_has_advtrain(candidates, tmp_path, monkeypatch):
    """Each Python but the last candidate lacks the libraries; without candidates, all do."""
    for name in ("python", "python3"):
        has_them = bool(candidates) and name == candidates[-1]
        check = '[ "$1" = -c ] && exit 0\necho "$0 $@"' if has_them else "echo broken >&2; exit 1"
        (tmp_path / name).write_text(f"#!/bin/sh\n{check}\n")
        (tmp_path / name).chmod(0o755)
    command = entrypoint(["train", "my recipe"], "job")
    path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={"PATH": path})
    if candidates:
        assert done.stdout == f"{tmp_path / candidates[-1]} -m pipelines train my recipe --once job\n"
        assert done.returncode == 0
    else:
        assert "no Python on" in done.stdout
        assert "--runtime-env" in done.stdout
        assert done.returncode == 2
    assert done.stderr == ""


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
    head: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def cluster():
    gcs, dashboard = free_port(), free_port()
    path = f"/usr/bin{os.pathsep}/bin"  # jobs must find the Python of Ray
    env = user_environment({"PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **TOKEN})
    env.pop("PYTHONPATH")  # the job must run the uploaded code
    command = [
        str(BIN / "ray"),
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
        yield Cluster(url, f"127.0.0.1:{gcs}", env)
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
    assert f"job {job} is running" in first.stdout
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
    words[1] = "none.yaml"
    for _ in range(2):  # the log of the first start is not printed again
        failing = advtrain(cluster, "submit", *words)
        assert failing.returncode == 1, failing.stdout
        assert failing.stdout.count("cannot read the recipe 'none.yaml'") == 1
    unknown = advtrain(cluster, "stop", "advtrain-train-digits-0000000000")
    assert unknown.returncode == 2
    assert "no job" in unknown.stderr


@pytest.mark.study
@pytest.mark.slow
def test_job_trains_and_registers_a_text_classifier(cluster, tmp_path):
    path, store = write_texts(tmp_path / "texts.txt"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["train", "trec", "--workers", "1", "--runs", str(tmp_path / "runs"), "--tracking-uri", store]
    settings = [
        f"data={{source: text, path: {path}}}",
        "model.args={dim: 8, channels: 6}",
        "training.epochs=2",
    ]
    settings.append("evaluation.attack={num_steps: 2, num_restarts: 1}")
    done = advtrain(cluster, "submit", *words, *(w for s in settings for w in ("--set", s)), "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2" in done.stdout
    assert "models:/trec/1" in done.stdout
    text = ["--text", "the film is so good w1 v1"]
    said = run_advtrain("predict", "models:/trec/1", *text, "--tracking-uri", store, cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert re.search("good|bad", said.stdout)


@pytest.mark.slow
def test_doctor_job_checks_the_nodes(cluster, tmp_path):
    words = ["--runs", str(tmp_path), "--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    done = advtrain(cluster, "submit", "doctor", "--follow", *words)
    assert done.returncode == 0, done.stdout
    assert re.search(r"ok +node [\d.]+ \(.*\): python .*; the run folder is shared", done.stdout)


@pytest.mark.slow
def test_jobs_asks_the_head_for_its_dashboard(cluster, tmp_path):
    env = {**TOKEN, "RAY_ADDRESS": cluster.head}
    del env["RAY_AUTH_MODE"]  # the token is enough
    listed = run_advtrain("jobs", cwd=tmp_path, env=env)
    assert listed.returncode == 0, listed.stderr
    assert f"jobs at {cluster.url}" in listed.stdout


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False])
def test_doctor_sends_the_token_of_a_file_to_a_cluster_that_requires_it(
    cluster, tmp_path, monkeypatch, is_known
):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):  # of this process's own Ray
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "token").write_text(TOKEN["RAY_AUTH_TOKEN"])
    env = {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")} if is_known else {})
    done = run_advtrain("doctor", "--address", cluster.head, cwd=tmp_path, env=env)
    of_a_task = r"node [\d.]+ \(.*advtrain"
    answer = of_a_task if is_known else "FAIL +Ray: .* requires the cluster's token"
    assert re.search(answer, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.slow
def test_jobs_rejects_invalid_cluster_token(cluster):
    refused = advtrain(cluster, "jobs", token={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64})
    assert refused.returncode == 2
    assert "uthenticat" in refused.stderr
    assert "Traceback" not in refused.stderr
