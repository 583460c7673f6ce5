"""Measure the memory that a data set takes in the driver, in Ray's store and in a worker.

    python -m tests.benchmarks.bench_memory --mebibytes 512

The data are random images. The table has the driver's private memory, without the libraries, and the part of a local
Ray's store that it has in use.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import ray

from advtrain.cluster import start_ray, stop_ray
from advtrain.data import ArraySplit, Dataset

SHAPE = (3, 32, 32)


def resident() -> tuple[float, float]:
    """Return the private memory of this process and its part of Ray's store, in MiB (Linux)."""
    text = Path("/proc/self/status").read_text()
    private, shared = (
        int(re.findall(rf"Rss{kind}:\s+(\d+) kB", text)[0]) / 1024 for kind in ("Anon", "Shmem")
    )
    return private, shared


def make(mebibytes: int) -> Dataset:
    """Return a data set of random images, nearly all of them for training."""
    rng = np.random.default_rng(0)
    number = mebibytes * 2**20 // int(np.prod(SHAPE))
    images = rng.integers(0, 256, (number, *SHAPE), dtype=np.uint8)
    small = [ArraySplit(images[:10].copy(), np.arange(10)) for _ in range(2)]
    return Dataset("random", ArraySplit(images, np.zeros(number, np.int64)), *small, 10, SHAPE, "0" * 64)


def worker(data: Dataset) -> float:
    """Read all images; return what this adds to the worker's private memory, in MiB."""
    before, _ = resident()
    assert isinstance(data.train, ArraySplit)
    data.train.images.sum()
    return resident()[0] - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=512)
    size = parser.parse_args().mebibytes
    start_ray(None)
    base, _ = resident()

    def report(state: str) -> None:
        private, shared = resident()
        print(f"{state:<32} {private - base:8.0f} {shared:8.0f}")

    print(f"{'MiB':<32} {'driver':>8} {'store':>8}")
    data = make(size)
    report("loaded")
    reference = ray.put(data)
    report("put into the store")
    data.share_memory_of(ray.get(reference))
    report("driver reads the store")
    print(f"a worker that reads all images: {ray.get(ray.remote(worker).remote(reference)):.0f} MiB")
    stop_ray()


if __name__ == "__main__":
    main()
