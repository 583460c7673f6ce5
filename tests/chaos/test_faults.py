"""Faults on a real Ray cluster of several nodes. `make chaos` runs them all and prints the results."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import metadata

import psutil
import pytest

from tests.chaos.story import EPOCHS, SLOW, STEPS, TrackingServer, finished, resume, same, start
from tests.cluster_kit import RAY, TOKEN, ray_cluster
from tests.kit import ROOT, advtrain, mounted, wait_for
from tests.servers import s3


def test_worker_process_killed(cluster, calm, story, tmp_path):
    training = start(cluster, tmp_path)
    training.until(3)
    first = training.progress["pid"]
    os.kill(first, signal.SIGKILL)
    seconds = training.back(first)
    story.back = f"{seconds:.1f} s"
    story.result = same(finished(training), calm)
    story.line = training.find_line("note: rank .*resumed from step")
    assert seconds < 20


def test_node_killed_in_mid_epoch_and_another_joins(cluster, calm, story, tmp_path):
    training = start(cluster, tmp_path)
    training.until(3)
    first, victim = training.progress["pid"], cluster.nodes.pop()
    victim.kill()
    started = time.monotonic()
    cluster.add()
    training.wait(lambda: len(training.run.attempts()) > 1, "a new worker group")
    training.wait(lambda: training.progress["step"] > training.run.attempts()[-1]["step"], "a new step")
    story.back = f"{time.monotonic() - started:.1f} s"
    story.result = same(finished(training), calm)
    story.line = training.find_line("note: rank .*resumed from step")
    assert victim.ip in story.line
    assert first


def test_node_joins_and_leaves(cluster, calm, story, tmp_path):
    """An elastic run goes from two workers to three and back. Each epoch covers the same batches."""
    often = {"ADVTRAIN_RESIZE_S": "8"}
    training = start(cluster, tmp_path, workers="[1, 3]", env=often, adversary__num_steps="80")
    training.until(2)
    joined = cluster.add()
    training.wait(lambda: len(training.run.attempts()) == 2, "three workers", 180)
    training.wait(lambda: training.run.metrics()[-1]["num_workers"] == 3, "an epoch of three")
    cluster.nodes.remove(joined)
    joined.kill()
    run = finished(training)
    assert [a["workers"] for a in run.attempts()] == [2, 3, 2]
    robust, expected = (r.metrics()[-1]["val_robust_accuracy"] for r in (run, calm))
    assert robust == pytest.approx(expected, abs=0.1)  # each rank draws its own random starts
    story.result = f"2, 3, 2 workers; robust {100 * robust:.1f} %, without {100 * expected:.1f} %"
    story.line = training.find_line("resumed from step .* with 3 workers instead of 2")
    training.find_line(f"gone from the cluster: {joined.ip}.*with 2 workers instead of 3")


def test_training_waits_for_nodes_from_autoscaler(cluster, story, tmp_path):
    """Three workers on two nodes are rejected. With training.accelerator the run waits for nodes."""
    refused = start(cluster, tmp_path, workers="3")
    assert refused.process.wait(60) == 2
    assert "needs 3 CPUs, but the cluster has 2" in refused.output
    later = tmp_path / "later"
    later.mkdir()
    training = start(cluster, later, workers="3", training__accelerator="cpu")
    training.wait(lambda: "waiting for nodes" in training.output, "the notice")
    time.sleep(5)
    joined = cluster.add()
    run = finished(training)
    cluster.nodes.remove(joined)
    joined.kill()
    assert run.attempts()[0]["workers"] == 3
    story.result = "trained by three"
    story.line = training.find_line("waiting for nodes")


def test_preemption_notice(cluster, slow_calm, story, tmp_path):
    """A node is drained with a deadline, as at a spot notice, and leaves at the deadline."""
    cluster.add()  # the replacement
    training = start(cluster, tmp_path, **SLOW, training__checkpoint_steps="null")
    training.until(2)
    run = training.run
    leaving = next(n for n in cluster.nodes if n.ip == run.attempts()[0]["nodes"][1])
    deadline = time.monotonic() + 8
    drain = [RAY, "drain-node", "--address", cluster.address, "--node-id", cluster.node_id(leaving)]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run(
        [*drain, "--deadline-remaining-seconds", "8"], env=cluster.env, check=True, capture_output=True
    )
    training.wait(lambda: "preemption notice for the node" in training.output, "the notice")
    noticed = time.monotonic()
    assert noticed < deadline
    mid_epoch = [p.name for p in run.checkpoints.glob("step-*") if int(p.name[5:]) % STEPS]
    assert mid_epoch, "no checkpoint between epochs"
    time.sleep(max(0.0, deadline - time.monotonic()))
    cluster.nodes.remove(leaving)
    leaving.kill()
    gone = time.monotonic()
    training.wait(lambda: len(run.attempts()) > 1, "a new worker group")
    story.back = f"{time.monotonic() - gone:.1f} s"
    story.result = same(finished(training), slow_calm)
    story.line = training.find_line("preemption notice for the node")
    assert leaving.ip not in run.attempts()[1]["nodes"]


def test_straggler(cluster, calm, story, tmp_path):
    """The process of one worker is stopped most of the time."""
    training = start(cluster, tmp_path)
    training.until(2)
    pid = training.progress["pid"]
    over = threading.Event()

    def hinder():
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.4)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        training.wait(lambda: "straggler" in training.output, "the remark")
    finally:
        over.set()
        thread.join()
    story.result = same(finished(training), calm)
    story.line = training.find_line("is a straggler")


def test_head_killed_and_restarted(calm, story, tmp_path):
    """All nodes and the command end with the head. A new cluster resumes from the last checkpoint."""
    with ray_cluster(tmp_path, nodes=2) as cluster:
        training = start(cluster, tmp_path)
        training.until(4)
        cluster.head.kill()
        started = time.monotonic()
        code = training.process.wait(120)
        ended = time.monotonic() - started
        assert code == 1
        story.line = training.find_line("the Ray cluster is gone.*--resume")
        assert "Traceback" not in training.output
    with ray_cluster(tmp_path, nodes=2) as cluster:
        again = resume(cluster, training)
        story.result = same(finished(again), calm)
    story.back = f"ended after {ended:.0f} s, then --resume"


def test_disk_full_on_a_worker(cluster, calm, story, tmp_path):
    """The small disk with the runs fills up. After space is freed the run is resumed."""
    with mounted(tmp_path / "runs", "size=40m") as disk:
        training = start(cluster, tmp_path)
        training.until(3)
        with (disk / "filler").open("wb") as filler, suppress(OSError):
            while True:
                filler.write(bytes(100_000))
                filler.flush()
        assert training.process.wait(120) == 1
        story.line = training.find_line("cannot write the checkpoint.*make room, then resume.*--resume")
        assert "Traceback" not in training.output
        (disk / "filler").unlink()
        story.result = same(finished(resume(cluster, training)), calm)
        story.back = "after room was made, --resume"


def test_mlflow_down_for_a_minute(cluster, calm, story, tmp_path):
    """The MLflow server is killed during training and restarted a minute later."""
    with TrackingServer(tmp_path) as server:
        training = start(cluster, tmp_path, "--tracking-uri", server.uri, adversary__num_steps="400")
        training.until(2)
        server.kill()
        gone = time.monotonic()
        training.wait(lambda: "is unreachable" in training.output, "the notice", 200)
        time.sleep(max(0.0, 60 - (time.monotonic() - gone)))
        server.start()
        run = finished(training)
    story.result = f"every epoch tracked, registered; {run.facts()['registered']}"
    story.line = (
        training.find_line("MLflow at .* is unreachable")
        + " ... "
        + training.find_line("MLflow is reachable")
    )


def test_mlflow_down_until_after_training(cluster, calm, story, tmp_path):
    """The server returns only after the command has ended. `advtrain sync` uploads the rest."""
    with TrackingServer(tmp_path) as server:
        training = start(cluster, tmp_path, "--tracking-uri", server.uri)
        training.until(2)
        server.kill()
        assert training.process.wait(240) == 1, training.output[-3000:]  # nothing is registered
        story.line = training.find_line("MLflow was unreachable: .*advtrain sync")
        server.start()
        done = advtrain("sync", training.run.name, cwd=tmp_path, env=TOKEN)
        assert done.returncode == 0, done.stdout + done.stderr
        story.result = same(finished(training, code=1), calm)
    story.back = "with advtrain sync"


def test_wrong_library_version(cluster, story, tmp_path):
    """A node has another version of safetensors. Nothing is trained."""
    other = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(other),
            "safetensors==0.5.3",
        ],
        check=True,
    )
    odd = cluster.add(env={"PYTHONPATH": f"{other}{os.pathsep}{ROOT}"})
    try:
        started = time.monotonic()
        training = start(cluster, tmp_path, workers="3")
        assert training.process.wait(120) == 1
        story.line = training.find_line("safetensors is 0.5.3 on .*, but .* where the command runs")
        assert odd.ip in story.line
        assert metadata.version("safetensors") in story.line
        assert not training.run.metrics()
        story.result = f"refused after {time.monotonic() - started:.0f} s, nothing trained"
    finally:
        cluster.nodes.remove(odd)
        odd.kill()


def test_s3_store_down_for_a_minute(story, tmp_path):
    """The S3 server hangs for a minute during training. The runs are stored only there."""
    with s3(tmp_path) as env, ray_cluster(tmp_path, nodes=2, env=env) as cluster:
        runs = "s3://advtrain/runs"
        settings = {"adversary__num_steps": "150", "training__epochs": str(EPOCHS)}
        training = start(cluster, tmp_path, "--runs", runs, env=env, **settings)
        port = env["AWS_ENDPOINT_URL"].rpartition(":")[2]
        (server,) = [p for p in psutil.Process().children() if p.cmdline()[-2:] == ["-p", port]]
        wait_for(lambda: "epoch 2/" in training.output, "the second epoch")
        server.suspend()
        stopped = time.monotonic()
        wait_for(lambda: "is unreachable" in training.output, "the notice")
        time.sleep(max(0.0, 60 - (time.monotonic() - stopped)))
        server.resume()
        assert training.process.wait(240) == 0, training.output[-3000:]
        story.line = (
            training.find_line("the storage .* is unreachable") + " ... " + training.find_line("again after")
        )
        epochs = re.findall(r"^epoch (\d+)/\d+  [\d,]+ samples", training.output, re.MULTILINE)
        assert epochs == [str(k) for k in range(1, EPOCHS + 1)]
    story.result = "each epoch once, registered"
    assert "models:/digits/1" in training.output
