"""Helpers for tests: small recipes and data, and the command line as a user runs it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from advtrain.data import Dataset, load_data
from advtrain.models import build_model
from advtrain.models.network import EmbeddingModel
from advtrain.models.small import cnn2
from advtrain.recipe import Recipe, load_recipe
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.threat import ThreatModel
from advtrain.training import Session, run_worker
from pipelines.cli.main import main

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipelines" / "recipes"
SHIPPED = list(RECIPES.glob("*.yaml"))

#: Settings for two epochs of the demo in one process, which take a second or two.
SMALL = (
    "training.epochs=2",
    "training.num_workers=0",
    "evaluation.attack.num_steps=5",
    "evaluation.attack.num_restarts=2",
    "evaluation.validation.num_steps=3",
)


def unset(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Unset environment variables until the end of the test, also if the test sets them."""
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored at the end
        monkeypatch.delenv(name)


def digits_recipe(*overrides: str) -> Recipe:
    """Return the shipped digits recipe, shortened, with overrides."""
    return load_recipe(RECIPES / "digits.yaml", [*SMALL, *overrides], allow_code=True)


def digits_data(recipe: Recipe | None = None) -> Dataset:
    """Load scikit-learn's digits as a dataset with splits."""
    return load_data((recipe or digits_recipe()).data, Path())


class Linear(nn.Module):
    """Linear model of two classes with logits (0, w x + b), whose worst case has a closed form."""

    def __init__(self, num_features: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_features, generator=generator))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


class Busy(nn.Module):
    """A network with all state that an attack might change: batch norm, dropout, frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * 36, 10),
        )
        self.body[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tokens(EmbeddingModel):
    """Model of image rows as tokens: a linear layer embeds each row, and empty rows are masked.

    z (N, L, D + 1) holds the embeddings and, as last channel, the mask. Attacks do not change the mask.
    """

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, trained: bool = False, depth: int = 6
    ) -> None:
        super().__init__()
        _, self.length, width = shape
        self.project = nn.Linear(width, depth).requires_grad_(trained)
        self.head = nn.Sequential(nn.Linear(self.length * depth, 48), nn.ReLU(), nn.Linear(48, num_classes))

    def embed(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1)
        mask = (rows.amax(2, keepdim=True) > 0).float()
        return torch.cat([self.project(rows) * mask, mask], 2)

    def classify(self, z: Tensor) -> Tensor:
        return self.head((z[..., :-1] * z[..., -1:]).flatten(1))

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        free = z[..., -1:].bool() & torch.tensor([True] * (z.shape[2] - 1) + [False], device=z.device)
        return replace(threat, low=-math.inf, high=math.inf, free=free)


class Pixels(EmbeddingModel):
    """A network whose embedding is the input, all of it free. It must behave like the plain network."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.network = cnn2(shape, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return x.clone()

    def classify(self, z: Tensor) -> Tensor:
        return self.network(z)

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        return replace(threat, free=torch.ones_like(z, dtype=torch.bool))


def fails(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Raise an error, as a broken model factory does."""
    raise RuntimeError("out of order")


def nothing_to_train(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a network without parameters."""
    return nn.Flatten()


def advtrain(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=cwd,
        env=user_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_here(*arguments: str) -> int:
    """Run a command in this process and return its exit code; the tests' shared Ray is left alone."""
    with patch("advtrain.cluster.stop_ray"), pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def start_advtrain(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, behind: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start the command line in its own process group, after the prefix `behind`; log to cwd/output.txt."""
    with (cwd / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*behind, sys.executable, "-m", "pipelines", *arguments],
            cwd=cwd,
            env=user_environment(env),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def user_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return a clean environment: MLflow sets variables of this process to the last store used."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return plain | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (extra or {})


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until a condition holds; raise AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain for: {what}")
        time.sleep(0.05)


def kill_evaluation(*command: str, cwd: Path, items: int) -> tuple[Path, list[str]]:
    """Kill an evaluation with SIGKILL when more than `items` work items are stored.

    Returns:
        The file of its work items, and its lines; the kill may have truncated the last one.
    """
    before = set((cwd / "runs").rglob("units.jsonl"))
    found: list[Path] = []

    def is_under_way() -> bool:
        found[:] = set((cwd / "runs").rglob("units.jsonl")) - before
        return any(len(path.read_text().splitlines()) > items for path in found)

    process = start_advtrain(*command, cwd=cwd)
    wait_for(is_under_way, "some work items")
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (path,) = found
    return path, path.read_text().splitlines()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs on a new folder; skip the test where mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def write_images(folder: Path, splits: dict[str, int], size: int = 12, classes: int = 3) -> None:
    """Write a small image folder SPLIT/CLASS/IMAGE.png; each class has its own shade."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60 * label, 60 * label + 60, (size, size + i % 3, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03d}.png")


def write_texts(path: Path, n: int = 120) -> Path:
    """Write n distinct lines `label text` of 3 to 20 words, whose label is one of the words."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        label, filler = ("bad", "good")[i % 2], rng.choice(["the", "film", "is", "so"], rng.integers(1, 18))
        words = [*filler[::2], label, *filler[1::2], f"w{i % 40}", f"v{i // 40}"]
        lines.append(f"{label} {' '.join(words)}\n")
    path.write_text("".join(lines))
    return path


def write_parquet_texts(folder: Path, splits: dict[str, slice] | None = None) -> Path:
    """Write texts as parquet files of several row groups; by default, the training texts are in two files."""
    folder.mkdir()
    lines = [line.split(" ", 1) for line in write_texts(folder / "a.txt", 300).read_text().splitlines()]
    (folder / "a.txt").unlink()
    for name, part in (
        splits or {"train-0": slice(130), "train-1": slice(130, 240), "test": slice(240, 300)}
    ).items():
        labels, texts = zip(*lines[part], strict=True)
        table = pa.table({"text": texts, "label": labels})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=17)
    return folder


def train_here(recipe: Recipe, folder: Path, dataset: Dataset | None = None) -> tuple[nn.Module, RunFolder]:
    """Train in this process; return the best model by validation (CPU, eval mode) and its run."""
    dataset = dataset or load_data(recipe.data, Path())
    run = RunFolder.create(
        folder,
        recipe.name,
        recipe.digest(),
        recipe.to_yaml(),
        {"status": "running", "data_digest": dataset.digest},
    )
    outcome = run_worker(recipe, dataset, run, Session())
    assert outcome.status == "finished", outcome.message
    model = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
    model.load_state_dict(best_checkpoint(run.checkpoints).best_weights())
    return model.eval(), run
