"""Benchmark 1, 2 and 4 workers on pinned cores, and the overhead of Ray Train over torchrun.

    python -m tests.benchmarks.bench_scale --data-root DIR

The setup is MNIST, cnn2, PGD-10, global batch 500 and one thread per worker, each pinned to a core (on two cores, four
workers share them). The same loop runs on the same number of processes under torchrun and under Ray Train, in turns.
The first epoch of each is left out. With one worker, Ray's other processes run on the other cores, so that only the
overhead inside the worker is measured. With as many workers as cores, they take time from the workers. Then the model
of scale_model.py is compared with these figures, with the all-reduce measured between two processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from advtrain.cluster import start_ray, stop_ray
from advtrain.data import load_data
from advtrain.models import build_model
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from advtrain.training import launch
from tests.benchmarks.scale_model import Step, step_s
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
BATCH, STEPS_OF_ATTACK = 500, 10
OVERRIDES = [
    f"adversary.num_steps={STEPS_OF_ATTACK}",
    "adversary.eps_warmup_epochs=0",
    f"training.batch_size={BATCH}",
    "evaluation.validation_samples=100",
    "evaluation.validation.num_steps=1",
]


def prepared(folder: str, workers: int, epochs: int) -> RunFolder:
    """Create the folder of a run that has not started."""
    workspace = [f"training.num_workers={workers}", f"training.epochs={epochs}"]
    recipe = load_recipe(ROOT / "pipelines" / "recipes" / "mnist.yaml", [*OVERRIDES, *workspace])
    return RunFolder.create(Path(folder), recipe.name, recipe.digest(), recipe.to_yaml(), {})


def step_times(run: RunFolder) -> list[float]:
    """Return the mean seconds per step of each epoch except the first."""
    lines = run.metrics()
    steps = lines[0]["step"]
    return [line["epoch_seconds"] / steps for line in lines[1:]]


def under_torchrun(workers: int, epochs: int, data_root: Path) -> list[float]:
    """Train under torchrun; return the step times."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(folder, workers, epochs)
        command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(workers)]
        command += ["--master-port", str(free_port()), "-m", "tests.benchmarks.torchrun_worker"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, str(run.path), str(data_root)], check=True, cwd=ROOT, env=env)
        return step_times(run)


def under_ray(workers: int, epochs: int, data_root: Path) -> list[float]:
    """Train on Ray Train workers; return the step times."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(folder, workers, epochs)
        recipe = load_recipe(run.path / "recipe.yaml")
        pinned: list[int] = []

        def tick() -> None:
            if not pinned and len(run.metrics()) == 0 and (run.progress() or {"step": 0})["step"] > 5:
                pinned.extend(pin())

        outcome = launch(recipe, load_data(recipe.data, data_root), run, tick=tick)
        assert len(pinned) == max(1, workers)
        assert outcome.status == "finished", outcome.message
        return step_times(run)


def pin() -> list[int]:
    """Pin each Ray Train worker to its own core, as torchrun_worker does; return their process ids."""
    cores = range(os.cpu_count() or 1)
    everything = list(psutil.process_iter(["name", "cmdline"]))
    workers = [p for p in everything if "TrainWorker" in (p.info["name"] or "")]
    others = [p for p in everything if p not in workers and "ray" in " ".join(p.info["cmdline"] or [])]
    for other in [*others, psutil.Process()] if len(workers) < len(cores) else []:
        with suppress(psutil.Error, OSError):
            for thread in other.threads():
                os.sched_setaffinity(thread.id, set(cores[len(workers) :]))
    for number, worker in enumerate(sorted(workers, key=lambda p: p.pid)):
        for thread in worker.threads():
            os.sched_setaffinity(thread.id, {number % len(cores)})
    return [worker.pid for worker in workers]


def _reduce(rank: int, port: int, sizes: list[int], out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    seconds = []
    for size in sizes:
        values = torch.zeros(size // 4)
        for repeat in range(12):
            if repeat == 2:
                started = time.perf_counter()
            dist.all_reduce(values)
        seconds.append((time.perf_counter() - started) / 10)
    if rank == 0:
        Path(out).write_text(" ".join(map(str, seconds)))
    dist.destroy_process_group()


def all_reduce() -> tuple[float, float]:
    """Return (bytes per second, latency per hop) between two processes, fitted to two message sizes."""
    small, large = 4_096, 32_000_000
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "times")
        mp.spawn(_reduce, (free_port(), [small, large], out), nprocs=2)
        low, high = map(float, Path(out).read_text().split())
    return (large - small) / max(high - low, 1e-9), low / 2  # ring(2) = bytes / bandwidth + 2 latency


def main() -> None:
    """Print the tables; fail if Ray Train adds more than 5 % to a step with one worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    how = (arguments.epochs, arguments.data_root)
    os.environ["OMP_NUM_THREADS"] = "1"
    with mock.patch("advtrain.cluster.available_cores", return_value=4):
        start_ray(None)
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for workers in (1, 2):
            times.setdefault(("torchrun", workers), []).extend(under_torchrun(workers, *how))
            times.setdefault(("ray", workers), []).extend(under_ray(workers, *how))
    times["ray", 4] = under_ray(4, *how)
    stop_ray()
    middle = {key: statistics.median(values) for key, values in times.items()}
    print(f"\n{os.cpu_count()} cores, cnn2, PGD-{STEPS_OF_ATTACK}, global batch {BATCH}")
    for (name, workers), seconds in sorted(middle.items()):
        spread = f"{1000 * min(times[name, workers]):.1f} to {1000 * max(times[name, workers]):.1f}"
        rate = f"{BATCH / seconds:8,.0f} samples/s"
        print(f"{workers} workers, {name:9s}{1000 * seconds:8.1f} ms a step ({spread}) {rate}")
    added = {n: middle["ray", n] / middle["torchrun", n] - 1 for n in (1, 2)}
    for workers, share in added.items():
        print(f"Ray Train adds {100 * share:+.1f} % to a step under torchrun, {workers} worker(s)")
    model = build_model(load_recipe(ROOT / "pipelines" / "recipes" / "mnist.yaml").model, (1, 28, 28), 10)
    size = 4 * sum(p.numel() for p in model.parameters())
    bandwidth, latency = all_reduce()
    half = Step(middle["ray", 1] / 2, 2 * STEPS_OF_ATTACK + 2, size)  # two workers share the global batch
    predicted = step_s(half, 2, bandwidth, latency)
    print(
        f"all-reduce here: {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} us a hop; gradient {size / 1e6:.2f} MB"
    )
    print(f"model: {1000 * predicted:.1f} ms a step of two workers, measured {1000 * middle['ray', 2]:.1f}")
    if added[1] > 0.05:
        raise SystemExit("more than 5 %")


if __name__ == "__main__":
    main()
