"""Measure the step of a linear probe (frozen backbone) as a share of full fine-tuning's step.

    python -m tests.benchmarks.bench_probe --data-root DIR [--rounds N]

The setup is MNIST, cnn4, batch 100, and attacks of 1 and 10 steps. If a forward pass costs 1, the gradient of the input
1 and that of the weights 1, then full fine-tuning with k attack steps costs 2 k + 3. The loss of a linear probe is
differentiated in the head only, so its step costs about 2 k + 1. Both loops take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from advtrain.data import load_data
from advtrain.recipe import Recipe
from tests.benchmarks.bench_methods import timed
from tests.benchmarks.bench_train import our_steps, recipe_for


def recipe_of(num_steps: int, freeze: str | None) -> Recipe:
    """Return the recipe of full fine-tuning, or with `freeze` of a linear probe."""
    values = recipe_for(num_steps).model_dump(mode="json", exclude_none=True)
    values["model"] |= {"name": "cnn4", "freeze": freeze}
    return Recipe.model_validate(values)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of two steps of each loop")
    arguments = parser.parse_args()
    dataset = load_data(recipe_for(1).data, arguments.data_root)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    print(f"{'attack steps':>12} {'full ms':>8} {'probe ms':>9} {'share':>6} {'expected':>9}")
    for k in (1, 10):
        full, probe = (our_steps(recipe_of(k, freeze), dataset) for freeze in (None, "backbone"))
        for loop in (full, probe):
            timed(loop, 2)
        times = [(timed(full, 2), timed(probe, 2)) for _ in range(arguments.rounds)]
        share = statistics.median(one / whole for whole, one in times)
        whole, one = (1000 * statistics.median(seconds) for seconds in zip(*times, strict=True))
        print(f"{k:12} {whole:8.1f} {one:9.1f} {share:6.2f} {(2 * k + 1) / (2 * k + 3):9.2f}", flush=True)


if __name__ == "__main__":
    main()
