"""Check every GPU path in one script: training steps, AutoAttack, the exported archive, peak memory.

    make gpu-check        or: python -m tests.benchmarks.gpu_check [--tiny]

It needs one GPU and PyTorch, and neither Ray nor MLflow. It takes less than eight minutes. `--tiny` runs the same on a
CPU, on small networks and batches. Its figures are meaningless. Inputs are random, because only times and agreement are
measured. The command exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import advtrain
from advtrain.data import ArraySplit, AugmentConfig, Dataset
from advtrain.models.serialized import ModelSource
from advtrain.recipe import Recipe
from advtrain.registry.export import RangeChecked
from advtrain.training.session import Session
from advtrain.training.step import Progress
from advtrain.training.worker import build_components

EPS, ALPHA, NUM_STEPS = 8 / 255, 2 / 255, 10
#: name -> settings of advtrain's training step.
VARIANTS = {
    "advtrain, fp32": {"channels_last": False},
    "advtrain, fp32, channels_last": {"channels_last": True},
    "advtrain, compiled": {"channels_last": True, "compile": True},
    "advtrain, bf16": {"channels_last": True, "precision": "bf16"},
    "advtrain, bf16, compiled": {"channels_last": True, "precision": "bf16", "compile": True},
}


@dataclass(frozen=True)
class Size:
    """Sizes of the checks."""

    device: torch.device
    batch: int
    steps: int  # timed
    attacked: int  # samples of the evaluation
    suite: str
    networks: dict[str, str]  # shown name -> the recipe's model.name
    variants: tuple[str, ...] = tuple(VARIANTS)


def vit(shape: tuple[int, ...], num_classes: int, *, depth: int = 6, width: int = 384) -> nn.Module:
    """Build a ViT with patches of 4x4 pixels, as used on CIFAR."""
    return torchvision.models.VisionTransformer(
        image_size=shape[1],
        patch_size=4,
        num_layers=depth,
        num_heads=6,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=num_classes,
    )


def small_vit(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a small ViT for --tiny."""
    return vit(shape, num_classes, depth=1, width=24)


FULL_NETWORKS = {"preact_resnet18": "preact_resnet18", "vit": "tests.benchmarks.gpu_check:vit"}
TINY_NETWORKS = {"cnn2": "cnn2", "vit": "tests.benchmarks.gpu_check:small_vit"}


def random_data(count: int) -> Dataset:
    """Return random 8-bit images (3, 32, 32) of ten classes, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
    split = ArraySplit(images, rng.integers(0, 10, count).astype(np.int64))
    return Dataset("random", split, split, split, 10, (3, 32, 32), "0" * 64)


def recipe_for(network: str, batch: int, **training: object) -> Recipe:
    """Return a recipe of PGD-10 adversarial training with SGD."""
    return Recipe.model_validate(
        {
            "name": "gpu-check",
            "data": {"source": "cifar10"},
            "model": {"name": network},
            "adversary": {"name": "pgd", "num_steps": NUM_STEPS, "step_size": ALPHA, "eps": EPS},
            "objective": {"adv_ce": 1.0},
            "optimizer": {"name": "momentum", "lr": 0.01},
            "training": {"epochs": 1, "batch_size": batch, **training},
            "evaluation": {"threat": {"norm": "linf", "eps": EPS}},
        }
    )


def our_steps(recipe: Recipe, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Run advtrain's training step; yield after each step."""
    components = build_components(recipe, dataset, Session(device=device))
    components.ddp_objective.train()
    number, size = 0, recipe.training.batch_size
    while True:
        batches = dataset.train.train_batches(size, 0, number, AugmentConfig(), components.session.place)
        for batch in batches:
            components.train_step(components, batch, Progress(number, 0.0))
            number += 1
            yield


def plain_steps(recipe: Recipe, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Run the loop of most published code: the attack also computes weight gradients in `loss.backward()`."""
    model = build_components(recipe, dataset, Session(device=device)).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = recipe.training.batch_size
    assert isinstance(dataset.train, ArraySplit)
    x = torch.from_numpy(dataset.train.images[:size]).to(device).float() / 255
    y = torch.from_numpy(dataset.train.labels[:size]).to(device)
    while True:
        delta = torch.zeros_like(x).uniform_(-EPS, EPS).requires_grad_()
        for _ in range(NUM_STEPS):
            F.cross_entropy(model((x + delta).clamp(0, 1)), y).backward()
            assert delta.grad is not None
            delta.data = (delta + ALPHA * delta.grad.sign()).clamp(-EPS, EPS)
            delta.grad.zero_()
        optimizer.zero_grad()
        F.cross_entropy(model((x + delta.detach()).clamp(0, 1)), y).backward()
        optimizer.step()
        yield


def wait(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(make: Callable[[], Iterator[None]], size: Size) -> tuple[float, float]:
    """Return milliseconds per step and peak memory in GB, measured after three warm-up steps."""
    if size.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(size.device)
    steps = make()
    for _ in range(3):
        next(steps)
    wait(size.device)
    started = time.perf_counter()
    for _ in range(size.steps):
        next(steps)
    wait(size.device)
    milliseconds = 1000 * (time.perf_counter() - started) / size.steps
    peak = torch.cuda.max_memory_allocated(size.device) / 1e9 if size.device.type == "cuda" else 0.0
    return milliseconds, peak


def check_steps(size: Size, dataset: Dataset) -> list[str]:
    """Time the training step of each network in each variant, against the plain loop."""
    lines = []
    for shown, network in size.networks.items():
        base = recipe_for(network, size.batch, channels_last=False)
        plain, memory = measure(lambda base=base: plain_steps(base, dataset, size.device), size)
        lines.append(f"{shown:16} {'plain loop':32} {plain:9.1f} ms  {1.0:5.2f}  {memory:6.2f} GB")
        for name in size.variants:
            recipe = recipe_for(network, size.batch, **VARIANTS[name])
            took, memory = measure(lambda recipe=recipe: our_steps(recipe, dataset, size.device), size)
            lines.append(f"{shown:16} {name:32} {took:9.1f} ms  {plain / took:5.2f}  {memory:6.2f} GB")
    return lines


def check_evaluation(size: Size, dataset: Dataset) -> list[str]:
    """Evaluate a network on samples that it classifies correctly, so that the suite attacks all of them."""
    network = next(iter(size.networks.values()))
    recipe = recipe_for(network, size.batch)
    model = build_components(recipe, dataset, Session(device=size.device)).model.eval()
    assert isinstance(dataset.test, ArraySplit)
    x = torch.from_numpy(dataset.test.images[: size.attacked]).to(size.device).float() / 255
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(250)])
    started = time.perf_counter()
    report = advtrain.evaluate(model, x, y, f"linf:{EPS}", suite=size.suite, full=False)
    seconds = time.perf_counter() - started
    assert report.clean_accuracy == 1, "the evaluation does not see what the model predicts"
    return [f"{size.suite} on {len(x)} images: {seconds:.1f} s, robust {report.robust_accuracy:.3f}"]


def archive(size: Size, dataset: Dataset) -> tuple[bytes, nn.Module]:
    """Return the pt2 archive that is registered, which checks the input range, and its network."""
    network = next(iter(size.networks.values()))
    model = build_components(recipe_for(network, size.batch), dataset, Session()).model.eval()
    example = torch.zeros(2, 3, 32, 32)
    dynamic = {"x": {0: torch.export.Dim("n")}}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(RangeChecked(model), (example,), dynamic_shapes=dynamic), buffer)
    return buffer.getvalue(), model


def check_archive(size: Size, dataset: Dataset) -> list[str]:
    """Check that the archive gives the logits of the network and rejects values outside [0, 1]."""
    content, model = archive(size, dataset)
    loaded = ModelSource(content).load().to(size.device)
    x = torch.rand(5, 3, 32, 32, device=size.device)
    with torch.no_grad():
        difference = float((loaded(x) - model.to(size.device)(x)).abs().max())
    assert difference < 1e-3, f"the archive's logits differ by {difference:.2g}"
    # A separate process, because a failed device-side assertion makes the GPU unusable for its process.
    code = (
        "import sys, torch\n"
        "from tests.benchmarks.gpu_check import *\n"
        "size = sizes('--tiny' in sys.argv)\n"
        "loaded = ModelSource(archive(size, random_data(64))[0]).load().to(size.device)\n"
        "loaded(torch.full((2, 3, 32, 32), 1.5, device=size.device)); wait(size.device)\n"
    )
    tiny = ["--tiny"] if size.device.type == "cpu" else []
    refused = subprocess.run([sys.executable, "-c", code, *tiny], capture_output=True, text=True)
    assert refused.returncode != 0, "the archive took values outside [0, 1]"
    assert "must lie in [0, 1]" in refused.stderr or "device-side assert" in refused.stderr, refused.stderr
    return [f"archive: logits agree to {difference:.1e}, values outside [0, 1] are refused"]


def sizes(tiny: bool) -> Size:
    """Return the sizes of the checks on the GPU, or with `tiny` on the CPU."""
    if tiny:
        variants = ("advtrain, fp32", "advtrain, bf16, compiled")
        return Size(torch.device("cpu"), 8, 1, 12, "apgd-ce-3,square-5", TINY_NETWORKS, variants)
    if not torch.cuda.is_available():
        sys.exit("no GPU is available to PyTorch; --tiny runs the same on the CPU")
    return Size(torch.device("cuda"), 256, 15, 1000, "autoattack", FULL_NETWORKS)


def main() -> None:
    """Run every check and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    size = sizes(parser.parse_args().tiny)
    where = torch.cuda.get_device_name() if size.device.type == "cuda" else "CPU, tiny form"
    print(f"torch {torch.__version__}, {where}, batch {size.batch}, PGD-{NUM_STEPS}", flush=True)
    dataset = random_data(max(size.attacked, 2 * size.batch))
    for check in (check_steps, check_evaluation, check_archive):
        print("\n".join(check(size, dataset)), flush=True)


if __name__ == "__main__":
    main()
