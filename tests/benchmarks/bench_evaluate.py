"""The suite `autoattack` against torchattacks' AutoAttack: the same model, samples and budgets, one thread each.

    python -m tests.benchmarks.bench_evaluate --data-root DIR [--samples N] [--model RUN]

MNIST test images that the model, a cnn2 of the shipped recipe `mnist`, has right. Without --model the recipe is trained
first, with --one-step by FGSM-RS. Both run attack by attack, on what still stands: torchattacks' parts in the order of
its AutoAttack, with the papers' 100 steps (its own default is 10), on a network of plain torch layers with the same
weights, as a user has it. Both see as many samples at a time. Each has a process of its own, since what one leaves in
memory slows the other down; they work in turns, an attack each.
Prints time and robust accuracy of each, and the ratio; ends with an error above LIMIT or where accuracies differ.
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

#: What a side's process knows: model, split, threat, batch_size and which samples stand.
side: dict[str, Any] = {}


def plain(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters ask for gradients, as they do by default."""
    return copy.deepcopy(model).eval().requires_grad_(True)


def begin(source: ModelSource, split: Split, threat: ThreatModel, batch_size: int) -> None:
    """Prepare a side's process."""
    torch.set_num_threads(1)
    side.update(model=source.load(), split=split, threat=threat, batch_size=batch_size)
    side.update(standing=np.arange(len(split)))


def theirs(name: str) -> tuple[float, int]:
    """Run a part of torchattacks' AutoAttack on what stands; return its seconds and how many stand then."""
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
    """The same of this project, which keeps freed memory as its commands do."""
    tune_malloc()
    started = time.perf_counter()
    how = {"seed": 0, "batch_size": side["batch_size"], "device": torch.device("cpu")}
    split = side["split"].take(side["standing"])
    samples = attack_samples(side["model"], split, build_suite(name), side["threat"], **how)
    side["standing"] = side["standing"][samples.robust]
    return time.perf_counter() - started, len(side["standing"])


def measure(*case: Any) -> dict[str, dict[str, tuple[float, int]]]:
    """Return what each attack gave, of both sides."""
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
    """Print both columns; fail if we are too slow or disagree."""
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
