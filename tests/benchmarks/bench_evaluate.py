"""The suite `autoattack` against torchattacks' AutoAttack: the same model, samples, budgets, one process, one thread.

    python -m tests.benchmarks.bench_evaluate --data-root DIR [--samples N] [--model RUN]

MNIST test images that the model, a cnn2 of the shipped recipe `mnist`, has right. Without --model the recipe is trained
first, with --one-step by FGSM-RS. Both run attack by attack, on what still stands: torchattacks' parts in the order of
its AutoAttack, with the papers' 100 steps (its own default is 10), on a network of plain torch layers with the same
weights, as a user has it. Both see as many samples at a time.
Prints time and robust accuracy of each, and the ratio; ends with an error above LIMIT or where accuracies differ.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.attacks import build_suite, predictions
from advtrain.config import load_recipe
from advtrain.data import load_data
from advtrain.environment import keep_freed_memory
from advtrain.evaluation import attack_samples
from advtrain.models.conv import Conv2d
from advtrain.runfolder import RunFolder
from pipelines.train import trained_model
from tests.kit import RECIPES, train_here

LIMIT, POINTS = 0.5, 0.3


def plain(model: nn.Module) -> nn.Module:
    """Return the same network with torch's own convolutions."""
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv2d):
                sizes = (
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,
                    child.stride,
                    child.padding,
                )
                other = nn.Conv2d(*sizes, bias=child.bias is not None)
                other.load_state_dict(child.state_dict())
                setattr(module, name, other)
    return found.eval()


def reference(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """Return which samples stand torchattacks' AutoAttack, (N,) bool, and the seconds of each part."""
    import torchattacks

    parts: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "apgd-ce": torchattacks.APGD(model, eps=eps, norm="Linf", seed=0, loss="ce", n_restarts=1, steps=100),
        "apgd-t": torchattacks.APGDT(
            model, eps=eps, norm="Linf", seed=0, n_classes=10, n_restarts=1, steps=100
        ),
        "fab-t": torchattacks.FAB(
            model, eps=eps, norm="Linf", seed=0, multi_targeted=True, n_classes=10, n_restarts=1, steps=100
        ),
        "square": torchattacks.Square(
            model, eps=eps, norm="Linf", seed=0, n_queries=5000, n_restarts=1, loss="ce"
        ),
    }
    standing, seconds = torch.ones(len(x), dtype=torch.bool), {}
    for name, attack in parts.items():
        started = time.perf_counter()
        for rows in standing.nonzero().flatten().split(batch_size):
            x_adv = attack(x[rows], y[rows])
            with torch.no_grad():
                standing[rows] = predictions(model(x_adv)) == y[rows]
        seconds[name] = time.perf_counter() - started
    return standing, seconds


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
    if arguments.model is not None:
        model = trained_model(RunFolder(arguments.model), recipe, dataset).load()
    else:
        with tempfile.TemporaryDirectory() as folder:
            model, _ = train_here(recipe, Path(folder), dataset)
    torch.set_num_threads(1)
    split = dataset.test.take(np.arange(arguments.samples))
    threat, judge = recipe.evaluation.threat_model, recipe.evaluation
    batch_size = arguments.batch_size or judge.batch_size
    how = {"seed": 0, "batch_size": batch_size, "device": torch.device("cpu")}
    x = torch.from_numpy(split.images).float() / 255
    y = torch.from_numpy(split.labels)
    with torch.no_grad():
        right = predictions(plain(model)(x)) == y
    theirs_standing, theirs = reference(plain(model), x[right], y[right], threat.eps, batch_size)
    keep_freed_memory()  # as our commands do; it would help theirs too
    ours: dict[str, float] = {}
    standing = np.arange(len(split))
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):  # one by one, to have the time of each
        started = time.perf_counter()
        samples = attack_samples(model, split.take(standing), build_suite(name), threat, **how)
        ours[name] = time.perf_counter() - started
        standing = standing[samples.robust]
    ours_robust, theirs_robust = len(standing) / len(split), theirs_standing.sum().item() / len(split)
    print(
        f"torch {torch.__version__}, one thread, {len(split)} test images, "
        f"batches of {batch_size}, {threat}, clean {right.float().mean():.4f}"
    )
    print(f"{'':10} {'torchattacks':>14} {'advtrain':>10} {'share':>7}")
    for name in ours:
        print(f"{name:10} {theirs[name]:12.1f} s {ours[name]:8.1f} s {ours[name] / theirs[name]:7.2f}")
    ratio = sum(ours.values()) / sum(theirs.values())
    print(
        f"{'in all':10} {sum(theirs.values()):12.1f} s {sum(ours.values()):8.1f} s {ratio:7.2f} (limit {LIMIT})"
    )
    print(f"{'robust':10} {theirs_robust:14.4f} {ours_robust:10.4f}")
    if ratio > LIMIT or 100 * abs(ours_robust - theirs_robust) > POINTS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
