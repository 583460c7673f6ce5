"""Benchmark two Ray Train workers against one process at the same global batch.

    python -m tests.benchmarks.bench_workers --data-root DIR

The setup is MNIST, cnn2, a one-step attack and global batch 500. The single process uses one thread per core. The two
workers use one core each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from advtrain.cluster import start_ray, stop_ray
from advtrain.data import load_data
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from advtrain.training import launch

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "mnist.yaml"
OVERRIDES = [
    "adversary.name=fgsm_rs",
    "adversary.num_steps=1",
    "adversary.eps_warmup_epochs=0",
    "training.batch_size=500",
    "evaluation.validation_samples=100",
    "evaluation.validation.num_steps=1",
]


def measure(num_workers: int, epochs: int, data_root: Path) -> tuple[float, float]:
    """Return (mean seconds per epoch without the first, seconds from launch to the first step)."""
    recipe = load_recipe(
        RECIPE, [*OVERRIDES, f"training.num_workers={num_workers}", f"training.epochs={epochs}"]
    )
    data = load_data(recipe.data, data_root)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder), recipe.name, recipe.digest(), recipe.to_yaml(), {})
        first: list[float] = []
        started = time.perf_counter()

        def tick() -> None:
            if not first and run.progress():
                first.append(time.perf_counter() - started)

        launch(recipe, data, run, tick=tick, interval_s=0.05)
        seconds = [line["epoch_seconds"] for line in run.metrics()][1:]
    return sum(seconds) / len(seconds), first[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    started = time.perf_counter()
    start_ray(None)
    print(f"ray.init            {time.perf_counter() - started:6.1f} s")
    one, one_start = measure(0, arguments.epochs, arguments.data_root)
    two, two_start = measure(2, arguments.epochs, arguments.data_root)
    stop_ray()
    print(f"one process         {one:6.2f} s an epoch, first step after {one_start:5.1f} s")
    print(f"two Ray workers     {two:6.2f} s an epoch, first step after {two_start:5.1f} s")
    print(f"ratio               {one / two:6.2f}")


if __name__ == "__main__":
    main()
