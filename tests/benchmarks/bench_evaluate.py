"""Benchmark the suite `autoattack` against AutoAttack of torchattacks at the same budgets.

    python -m tests.benchmarks.bench_evaluate --data-root DIR [--samples N] [--model RUN]

Both sides attack the MNIST test images that the model classifies correctly. The model is a cnn2 of the shipped recipe
`mnist`. Without --model the recipe is trained first, with --one-step by FGSM-RS. Both run one attack after another on
the samples that are still robust, with the same batch size and one thread. torchattacks uses the order of its
AutoAttack and the papers' 100 steps (its default is 10). Its network has plain torch layers and the same weights.
Each side has its own process, because memory that one side leaves behind slows the other down. They take turns.
The script prints the time and robust accuracy of each side and the ratio. It exits with 1 above LIMIT or where the
accuracies differ by more than POINTS.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advtrain.attacks import build_suite, predictions
from advtrain.data import Place, Split, load_data
from advtrain.environment import tune_malloc
from advtrain.evaluation import attack_samples
from advtrain.models.serialized import ModelSource
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from advtrain.threat import ThreatModel
from advtrain.training.trained_model import trained_model
from tests.kit import RECIPES, train_here

LIMIT, POINTS = 0.5, 0.3
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")

#: State of a side's process: model, split, threat, batch_size and indices of the samples that are still robust.
side: dict[str, Any] = {}


def plain(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters require gradients, as they do by default."""
    return copy.deepcopy(model).eval().requires_grad_(True)


def begin(source: ModelSource, split: Split, threat: ThreatModel, batch_size: int) -> None:
    """Initialize the process of one side."""
    torch.set_num_threads(1)
    side.update(model=source.load(), split=split, threat=threat, batch_size=batch_size)
    side.update(standing=np.arange(len(split)))


def theirs(name: str) -> tuple[float, int]:
    """Run a torchattacks attack on the robust samples; return its seconds and how many are still robust."""
    import torchattacks

    if len(side["standing"]) == 0:
        return 0.0, 0
    started, model, batch_size = time.perf_counter(), plain(side["model"]), side["batch_size"]
    common = {"eps": side["threat"].eps, "norm": "Linf", "seed": 0, "n_restarts": 1}
    attack = {
        "apgd-ce": lambda: torchattacks.APGD(model, loss="ce", steps=100, **common),
        "apgd-t": lambda: torchattacks.APGDT(model, n_classes=10, steps=100, **common),
        "fab-t": lambda: torchattacks.FAB(model, multi_targeted=True, n_classes=10, steps=100, **common),
        "square": lambda: torchattacks.Square(model, n_queries=5000, loss="ce", **common),
    }[name]()
    (batch,) = side["split"].take(side["standing"]).batches(len(side["standing"]), Place())
    kept = []
    for x, y in zip(batch.x.split(batch_size), batch.y.split(batch_size), strict=True):
        with torch.no_grad():
            right = predictions(model(x)) == y
        x_adv = x.clone()
        x_adv[right] = attack(x[right], y[right])
        with torch.no_grad():
            kept.append(right & (predictions(model(x_adv)) == y))
    side["standing"] = side["standing"][torch.cat(kept).numpy()]
    return time.perf_counter() - started, len(side["standing"])


def ours(name: str) -> tuple[float, int]:
    """Run the same attack of this project, with malloc tuned as in its commands."""
    tune_malloc()
    started = time.perf_counter()
    how = {"seed": 0, "batch_size": side["batch_size"], "device": torch.device("cpu")}
    split = side["split"].take(side["standing"])
    samples = attack_samples(side["model"], split, build_suite(name), side["threat"], **how)
    side["standing"] = side["standing"][samples.robust]
    return time.perf_counter() - started, len(side["standing"])


def measure(*case: Any) -> dict[str, dict[str, tuple[float, int]]]:
    """Return (seconds, robust samples) of each attack for both sides."""
    found: dict[str, dict[str, tuple[float, int]]] = {"torchattacks": {}, "advtrain": {}}
    alone = {"max_workers": 1, "mp_context": get_context("spawn"), "initializer": begin, "initargs": case}
    with ProcessPoolExecutor(**alone) as one, ProcessPoolExecutor(**alone) as other:
        sides: tuple[tuple[str, ProcessPoolExecutor, Callable[[str], tuple[float, int]]], ...] = (
            ("torchattacks", one, theirs),
            ("advtrain", other, ours),
        )
        for name in ATTACKS:
            for who, process, attack in sides:
                found[who][name] = process.submit(attack, name).result()
    return found


def main() -> None:
    """Print both columns; exit with 1 if advtrain is too slow or the accuracies differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--model", type=Path, help="run folder of a trained mnist recipe")
    parser.add_argument("--one-step", action="store_true")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    arguments = parser.parse_args()
    overrides = ["adversary={name: fgsm_rs, norm: linf, eps: 0.3}"] if arguments.one_step else []
    recipe = load_recipe(RECIPES / "mnist.yaml", [*overrides, "training.num_workers=0"])
    dataset = load_data(recipe.data, arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(arguments.model) if arguments.model else train_here(recipe, Path(folder), dataset)[1]
        source = trained_model(run, recipe, dataset)
    split, threat = dataset.test.take(np.arange(arguments.samples)), recipe.evaluation.threat_model
    batch_size = arguments.batch_size or recipe.evaluation.batch_size
    found = measure(source, split, threat, batch_size)
    print(
        f"torch {torch.__version__}, one thread, {len(split)} test images, batches of {batch_size}, {threat}"
    )
    print(f"{'':10} {'torchattacks':>14} {'advtrain':>10} {'share':>7}")
    seconds = {who: {name: value[0] for name, value in parts.items()} for who, parts in found.items()}
    for name in ATTACKS:
        first, second = seconds["torchattacks"][name], seconds["advtrain"][name]
        print(f"{name:10} {first:12.1f} s {second:8.1f} s {second / max(first, 1e-9):7.2f}")
    first, second = (sum(parts.values()) for parts in seconds.values())
    print(f"{'in all':10} {first:12.1f} s {second:8.1f} s {second / first:7.2f} (limit {LIMIT})")
    robust = [parts["square"][1] / len(split) for parts in found.values()]
    print(f"{'robust':10} {robust[0]:14.4f} {robust[1]:10.4f}")
    if second / first > LIMIT or 100 * abs(robust[0] - robust[1]) > POINTS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
