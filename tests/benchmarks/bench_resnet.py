"""Compare a training step of preact_resnet18 with a plain loop: CIFAR-10, batch 32, PGD-3, on the CPU.

    python -m tests.benchmarks.bench_resnet --data-root DIR [--steps N]

DIR holds CIFAR10-jpeg/train.parquet (columns image: bytes, label). All loops run the same attack on the same network in
turns, in one process. The plain loop follows most published code. If a weight gradient costs as much as an input
gradient, fewer passes give a speedup of at most 3 (k + 1) / (2 k + 3) for PGD-k, which is 1.33 for k = 3. Memory layout
and compiler multiply it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

import tests.benchmarks.gpu_check as gpu_check
from advtrain.data import ArraySplit, Dataset
from tests.benchmarks.bench_train import alternate

BATCH, NUM_STEPS = 32, 3


def cifar(root: Path, count: int) -> Dataset:
    """Return a dataset of the first `count` images of the training split."""
    rows = pq.read_table(root / "CIFAR10-jpeg" / "train.parquet").slice(0, count).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).transpose(2, 0, 1) for row in rows]
    labels = np.array([row["label"] for row in rows], np.int64)
    split = ArraySplit(np.stack(images).astype(np.uint8), labels)
    return Dataset("CIFAR10-jpeg", split, split, split, 10, (3, 32, 32), "0" * 64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10, help="steps of each loop that are timed")
    arguments = parser.parse_args()
    dataset, device = cifar(arguments.data_root, 40 * BATCH), torch.device("cpu")
    gpu_check.NUM_STEPS = NUM_STEPS

    def recipe(**training: object) -> gpu_check.Recipe:
        return gpu_check.recipe_for("preact_resnet18", BATCH, **training)

    loops = {
        "plain loop": gpu_check.plain_steps(recipe(channels_last=False), dataset, device),
        "advtrain, NCHW": gpu_check.our_steps(recipe(channels_last=False), dataset, device),
        "advtrain": gpu_check.our_steps(recipe(), dataset, device),
        "advtrain, compiled": gpu_check.our_steps(recipe(compile=True), dataset, device),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, preact_resnet18, PGD-{NUM_STEPS}")
    seconds, _ = alternate(loops, arguments.steps, block=2)
    for name, total in seconds.items():
        step = 1000 * total / arguments.steps
        print(f"  {name:20} {step:8.1f} ms a step  {seconds['plain loop'] / total:5.2f}", flush=True)


if __name__ == "__main__":
    main()
