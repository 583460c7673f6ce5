"""The Slurm script with stand-ins for srun and scontrol, which behave as Slurm's manual pages describe."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import start as ray_start

from advtrain.runs.folder import RunFolder
from pipelines.cli.cluster import check_command
from pipelines.cli.main import app  # noqa: F401 (all commands)
from tests.cluster_kit import kill_family
from tests.kit import ROOT, user_environment, wait_for

SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"
PYTHON = f"#!{sys.executable}\n"
NODES = ("127.0.0.21", "127.0.0.22")
JOB = str(os.getpid())

#: A step of one task per node. srun takes no --cpus-per-task from the job (since 22.05), kills its tasks after a TERM,
#: and with --kill-on-bad-exit after the first failure.
SRUN = """
import json, os, signal, subprocess, sys, time
import psutil
given, words = {}, sys.argv[1:]
while words[0].startswith("--"):
    name, _, value = words.pop(0).removeprefix("--").partition("=")
    given[name] = value
with open(os.path.join(os.environ["FAKE_SLURM"], "srun.jsonl"), "a") as log:
    log.write(json.dumps({"options": given, "command": words}) + "\\n")
nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
assert int(given["nodes"]) == len(nodes) and given["ntasks-per-node"] == "1"
job = {k: v for k, v in os.environ.items() if k != "SLURM_CPUS_PER_TASK"}
if "cpus-per-task" in given:
    job["SLURM_CPUS_PER_TASK"] = given["cpus-per-task"]
tasks = [
    subprocess.Popen(
        words, env=job | {"SLURM_NODEID": str(i), "SLURMD_NODENAME": node}, start_new_session=True
    )
    for i, node in enumerate(nodes)
]
def kill(*_):
    for task in tasks:
        try:
            members = [psutil.Process(task.pid), *psutil.Process(task.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for member in members:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
signal.signal(signal.SIGTERM, kill)
while any(task.poll() is None for task in tasks):
    if "kill-on-bad-exit" in given and any(task.poll() for task in tasks):
        kill()
    time.sleep(0.1)
sys.exit(max(abs(task.returncode) for task in tasks))
"""

#: `scontrol requeue` ends the batch script, which gets a TERM first.
SCONTROL = """
import os, signal, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={sys.argv[3]} JobName=advtrain\\n   JobState={os.environ.get('STATE', 'RUNNING')} Reason=None")
elif sys.argv[1] == "requeue":
    with open(os.path.join(os.environ["FAKE_SLURM"], "requeued"), "a") as log:
        log.write(sys.argv[2] + "\\n")
    os.kill(os.getppid(), signal.SIGTERM)
else:
    sys.exit("unknown: " + " ".join(sys.argv[1:]))
"""

#: Ray that records its arguments and runs until it is killed. The head listens on its port.
RAY = """
import json, os, socket, sys, time
for word in sys.argv:
    if word.startswith("--port="):
        server = socket.create_server((os.environ["SLURMD_NODENAME"], int(word[7:])))
names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
with open(os.path.join(os.environ["FAKE_SLURM"], f"ray-{os.environ['SLURM_NODEID']}.json"), "w") as log:
    json.dump({"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}, log)
time.sleep(0 if os.environ.get("RAY_ENDS") else 600)
sys.exit(1)
"""

#: Python whose `-m pipelines` records its arguments, waits for a TERM if asked to, and ends with the given status.
COMMAND = """
import json, os, signal, sys, time
if sys.argv[1:3] != ["-m", "pipelines"]:
    if "ray.init" in sys.argv[2]:  # wait for the nodes
        while os.environ.get("RAY_WAITS") or not os.path.exists(os.environ["FAKE_SLURM"] + "/ray-1.json"):
            time.sleep(0.05)
        sys.exit(0)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
def stop(*_):
    sys.exit(int(os.environ["STATUS"]))
signal.signal(signal.SIGTERM, stop)
with open(os.path.join(os.environ["FAKE_SLURM"], "command.json"), "w") as log:
    json.dump({"arguments": sys.argv[3:], "address": os.environ["RAY_ADDRESS"]}, log)
while os.environ.get("WAITS"):
    time.sleep(0.05)
stop()
"""


class FakeSlurm:
    """A job of two nodes on this machine. Each call of `start` runs the script as sbatch would."""

    def __init__(self, folder: Path, programs: dict[str, str], env: dict[str, str]) -> None:
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "job.log"
        self.bin.mkdir()
        for name, text in programs.items():
            (self.bin / name).write_text(PYTHON + text)
            (self.bin / name).chmod(0o755)
        self.env = user_environment(
            {
                "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "FAKE_SLURM": str(folder),
                "SLURM_JOB_ID": JOB,
                "SLURM_JOB_NODELIST": ",".join(NODES),
                "SLURM_JOB_NUM_NODES": str(len(NODES)),
                **env,
            }
        )
        self.batch: subprocess.Popen[bytes] | None = None

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Run a copy of the script, as Slurm does on the first node."""
        spooled = shutil.copy(SCRIPT, self.folder / "slurm_script")
        with self.log.open("ab") as log:  # --open-mode=append
            self.batch = subprocess.Popen(
                ["bash", spooled, *words],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.batch

    def term(self) -> None:
        """Send what Slurm sends 300 s before the time limit: TERM to the batch shell alone."""
        assert self.batch is not None
        os.kill(self.batch.pid, signal.SIGTERM)

    def requeues(self) -> list[str]:
        """Return the jobs that were requeued."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def read(self, name: str) -> Any:
        """Return what a stand-in has recorded."""
        return json.loads((self.folder / name).read_text())

    def steps(self) -> list[dict[str, Any]]:
        """Return the options and the command of each srun."""
        return [json.loads(line) for line in (self.folder / "srun.jsonl").read_text().splitlines()]

    def end(self) -> None:
        """Kill what is left of the job."""
        if self.batch is not None:
            kill_family(self.batch)
        shutil.rmtree(f"/tmp/advtrain-job-{JOB}", ignore_errors=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    """Return a job in which Ray and the command are stand-ins too."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python": COMMAND}
    job = FakeSlurm(
        tmp_path, programs, {"SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1", "STATUS": "0"}
    )
    yield job
    job.end()


def directives() -> dict[str, str]:
    """Return the #SBATCH options of the script."""
    found = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE)
    return dict(found)


def test_example_asks_for_one_worker_per_gpu():
    options = directives()
    line = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("# sbatch "))
    words = shlex.split(line.removeprefix("# sbatch infra/slurm/train.sbatch"))
    gpus = int(options["nodes"]) * int(options["gpus-per-node"])
    assert int(words[words.index("--workers") + 1]) == gpus
    assert check_command(words) == words


def test_job_is_requeued_and_signaled_before_its_time_limit():
    options = directives()
    assert "requeue" in options
    assert re.fullmatch(r"B:TERM@\d+", options["signal"]), "only the batch shell forwards TERM"
    assert options["open-mode"] == "append", "a requeued job would overwrite its log"


def test_script_without_arguments_prints_usage(slurm):
    assert slurm.start().wait(10) == 2
    assert "usage: sbatch infra/slurm/train.sbatch train" in slurm.log.read_text()


def test_script_starts_ray_on_each_node_with_its_cpus_gpus_and_token(slurm):
    assert slurm.start("train", "mnist", "--workers", "2").wait(30) == 0, slurm.log.read_text()
    first, last = slurm.steps()
    assert first["options"]["cpus-per-task"] == "8"
    assert last["command"] == ["rm", "-rf", "--", f"/tmp/advtrain-job-{JOB}"]
    head, worker = slurm.read("ray-0.json"), slurm.read("ray-1.json")
    address = slurm.read("command.json")["address"]
    assert address.startswith(NODES[0] + ":")
    assert "--head" in head["arguments"]
    assert f"--port={address.partition(':')[2]}" in head["arguments"]
    assert f"--address={address}" in worker["arguments"]
    for node in (head, worker):
        assert {"--num-cpus=8", "--num-gpus=1", "--block"} <= set(node["arguments"])
        assert node["RAY_AUTH_MODE"] == "token"
        assert re.fullmatch("[0-9a-f]{64}", node["RAY_AUTH_TOKEN"])
    assert head["RAY_AUTH_TOKEN"] == worker["RAY_AUTH_TOKEN"]
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for node in (head, worker):
        assert node["arguments"][0] == "start"
        assert {word.partition("=")[0] for word in node["arguments"][1:]} <= known
    assert not Path(f"/tmp/advtrain-job-{JOB}").exists()


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        (["tune", "mnist"], ["tune", "mnist", "--once", f"slurm-{JOB}"]),
        (["evaluate", "a run"], ["evaluate", "a run"]),
    ],
)
def test_script_passes_command_and_its_status(slurm, words, ran):
    slurm.env["STATUS"] = "7"
    assert slurm.start(*words).wait(30) == 7
    assert slurm.read("command.json")["arguments"] == ran
    assert check_command(ran) == ran
    assert slurm.requeues() == []


@pytest.mark.parametrize(
    ("status", "state", "requeues"),
    [("130", "RUNNING", [JOB]), ("130", "CANCELLED", []), ("130", "COMPLETING", []), ("0", "RUNNING", [])],
)
def test_term_reaches_command_and_requeues_unfinished_job(slurm, status, state, requeues):
    slurm.env |= {"STATUS": status, "STATE": state, "WAITS": "1"}
    batch = slurm.start("train", "mnist")
    wait_for(lambda: (slurm.folder / "command.json").exists(), "the command", 30)
    slurm.term()
    assert batch.wait(30) == int(status)
    assert slurm.requeues() == requeues


def test_term_before_the_command_starts_requeues_job(slurm):
    slurm.env["RAY_WAITS"] = "1"
    batch = slurm.start("train", "mnist")
    wait_for(lambda: (slurm.folder / "srun.jsonl").exists(), "the step", 30)
    slurm.term()
    assert batch.wait(30) != 0
    assert slurm.requeues() == [JOB]
    assert not (slurm.folder / "command.json").exists()


def test_head_address_is_no_loopback_of_debian(slurm):
    for name, text in (("getent", "127.0.1.1       STREAM node1"), ("hostname", f"{NODES[0]} 10.0.0.9")):
        (slurm.bin / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (slurm.bin / name).chmod(0o755)
    assert slurm.start("evaluate", "run").wait(30) == 0, slurm.log.read_text()
    assert slurm.read("command.json")["address"].startswith(f"{NODES[0]}:")


def test_job_fails_when_ray_ends_before_the_command(slurm):
    slurm.env |= {"WAITS": "1", "RAY_ENDS": "1"}
    assert slurm.start("train", "mnist").wait(30) == 137
    assert "Ray has ended" in slurm.log.read_text()
    assert slurm.requeues() == []


SMALL = (
    "training.epochs=8",
    "training.checkpoint_steps=5",
    "training.accelerator=cpu",
    "adversary.num_steps=10",  # some seconds in total, so that TERM arrives during training
    "evaluation.attack.num_steps=5",
    "evaluation.attack.num_restarts=1",
    "evaluation.validation.num_steps=5",
)


@pytest.mark.ray
@pytest.mark.slow
def test_requeued_training_resumes_on_two_nodes(tmp_path):
    job = FakeSlurm(tmp_path, {"srun": SRUN, "scontrol": SCONTROL}, {"SLURM_CPUS_PER_TASK": "1"})
    words = ["train", "digits", "--workers", "2", *(word for pair in SMALL for word in ("--set", pair))]
    try:
        batch = job.start(*words)
        wait_for(lambda: len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) > 0, "a checkpoint", 180)
        folder = Path(f"/tmp/advtrain-job-{JOB}")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        job.term()
        assert batch.wait(120) == 130, job.log.read_text()
        assert job.requeues() == [JOB]
        assert not folder.exists()
        (path,) = (tmp_path / "runs").iterdir()
        run = RunFolder(path)
        assert run.facts()["status"] == "stopped"
        assert "stopped at step" in run.facts()["message"]
        assert job.start(*words).wait(400) == 0, job.log.read_text()
        assert run.facts()["status"] == "finished"
        assert "resuming" in job.log.read_text()
        assert len(run.metrics()) == 8
        assert job.requeues() == [JOB]
    finally:
        job.end()
