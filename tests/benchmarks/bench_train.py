"""Compare training with a plain loop: one MNIST epoch, cnn2, batch 100, one-step attack and PGD-10.

    python -m tests.benchmarks.bench_train --data-root DIR [--steps N] [--workers]

The plain loop follows most published code. Its DataLoader converts one image at a time into a tensor, and
its attack calls `loss.backward()` with gradients of the parameters enabled. Both run the same attack (same
start distribution, steps, step size, projection) on the same network, data and optimizer, in turns, in one
process.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from advtrain.attacks import GradientAttack
from advtrain.data import Dataset, Place, load_data
from advtrain.evaluation import validation_accuracy
from advtrain.recipe import Recipe, load_recipe
from advtrain.training.session import Session
from advtrain.training.step import Progress
from advtrain.training.worker import build_components

EPS = 0.2  # at 0.3 neither loop gets above chance within an epoch


def recipe_for(num_steps: int) -> Recipe:
    """Return the shipped MNIST recipe at batch 100 with one attack step (FGSM-RS) or PGD."""
    attack = (
        ["adversary.name=fgsm_rs", "adversary.num_steps=1", f"adversary.step_size={1.25 * EPS}"]
        if num_steps == 1
        else [
            "adversary.name=pgd",
            f"adversary.num_steps={num_steps}",
            f"adversary.step_size={2.5 * EPS / num_steps}",
        ]
    )
    shipped = Path(__file__).parents[2] / "pipelines" / "recipes" / "mnist.yaml"
    return load_recipe(
        shipped,
        [
            "training.batch_size=100",
            "training.epochs=1",
            "training.num_workers=0",
            f"adversary.eps={EPS}",
            "adversary.eps_warmup_epochs=0",
            f"evaluation.threat.eps={EPS}",
            "optimizer.lr=1e-3",
            "optimizer.schedule.kind=constant",
            *attack,
        ],
    )


def obvious_network() -> nn.Module:
    """Build the cnn2 of Wong et al. 2020 from plain torch layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def obvious_steps(root: Path, num_steps: int, alpha: float) -> Iterator[nn.Module]:
    """Train with the plain loop; yield the model after each step."""
    data = torchvision.datasets.MNIST(root, train=True, transform=torchvision.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(data, batch_size=100, shuffle=True)
    model = obvious_network().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in itertools.chain.from_iterable(itertools.repeat(loader)):
        delta = torch.zeros_like(x).uniform_(-EPS, EPS)
        delta.data = (x + delta).clamp(0, 1) - x
        delta.requires_grad = True
        for _ in range(num_steps):
            loss = F.cross_entropy(model(x + delta), y)
            loss.backward()
            delta.data = (delta + alpha * delta.grad.sign()).clamp(-EPS, EPS)
            delta.data = torch.max(torch.min(1 - x, delta.data), 0 - x)
            delta.grad.zero_()
        optimizer.zero_grad()
        F.cross_entropy(model(x + delta.detach()), y).backward()
        optimizer.step()
        yield model


def our_steps(recipe: Recipe, dataset: Dataset) -> Iterator[nn.Module]:
    """Train with the step of advtrain; yield the model after each step."""
    session = Session()
    parts = build_components(recipe, dataset, session)
    parts.train_mode()
    number = 0
    for epoch in itertools.count():
        for batch in dataset.train.train_batches(100, 0, epoch, recipe.data.augment, session.place):
            parts.train_step(parts, batch, Progress(number, number / 600))
            number += 1
            yield parts.network


def alternate(
    loops: dict[str, Iterator[nn.Module]], num_steps: int, block: int = 150
) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Run all loops in turns of `block` steps, so that load on the machine affects all alike.

    Returns the seconds of each loop for `num_steps` steps, and its final model.
    """
    models = {name: next(steps) for name, steps in loops.items()}  # the first step warms up, untimed
    seconds = dict.fromkeys(loops, 0.0)
    for first in range(0, num_steps, block):
        for name, steps in loops.items():
            started = time.perf_counter()
            for _ in range(min(block, num_steps - first)):
                models[name] = next(steps)
            seconds[name] += time.perf_counter() - started
    return seconds, models


def robustness(model: nn.Module, dataset: Dataset) -> str:
    """Return clean and PGD-20 accuracy on 1,000 test samples, to show that both loops train alike."""
    judge = recipe_for(1).evaluation
    split = dataset.test.take(torch.arange(1000).numpy())
    attack = GradientAttack(judge.validation)
    sums = validation_accuracy(
        model, split, attack, judge.threat_model, seed=0, batch_size=500, place=Place()
    )
    clean, robust = (100 * sums[f"{kind}_accuracy"] / sums["samples"] for kind in ("clean", "robust"))
    return f"clean {clean:.1f} %, {judge.validation.num_steps}-step PGD {robust:.1f} %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600, help="steps of each epoch to run (600: all)")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.steps} of 600 steps",
        flush=True,
    )
    recipes = {num_steps: recipe_for(num_steps) for num_steps in (1, 10)}
    dataset = load_data(recipes[1].data, arguments.data_root)
    for num_steps, recipe in recipes.items():
        alpha = recipe.adversary.step_size
        assert alpha is not None
        loops = {
            "obvious loop": obvious_steps(arguments.data_root, num_steps, alpha),
            "advtrain": our_steps(recipe, dataset),
        }
        seconds, models = alternate(loops, arguments.steps)
        print(f"\n{'one-step' if num_steps == 1 else f'PGD-{num_steps}'}")
        for name, total in seconds.items():
            per_step = f"{1000 * total / arguments.steps:7.2f} ms a step, {total:6.1f} s in all"
            print(f"  {name:12}  {per_step}  {robustness(models[name], dataset)}")
        print(f"  ratio         {seconds['obvious loop'] / seconds['advtrain']:7.2f}", flush=True)


if __name__ == "__main__":
    main()
