"""Golden figures: bit-exact results of fixed trainings and one evaluation.

    python -m tests.golden.measure --write [--data-root DIR]

rewrites `figures.json` and `report.json`. Do this only in a commit that changes numbers on purpose and explains why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from advtrain.data import Dataset, load_data, stratified
from advtrain.evaluation import EvalSpec, evaluate
from advtrain.recipe import Recipe, load_recipe
from advtrain.runs.checkpoint import latest_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import launch
from advtrain.training.trained_model import trained_model
from pipelines.workspace import training_threat
from tests.kit import RECIPES

FIGURES, REPORT = (Path(__file__).with_name(name) for name in ("figures.json", "report.json"))
#: name -> (recipe, Ray workers). Two epochs each.
TRAININGS = {
    "digits": ("digits", 0),
    "digits, 1 worker": ("digits", 1),
    "digits, 2 workers": ("digits", 2),
    "mnist, 2,000 images": ("mnist", 0),
}
#: Number of test samples of digits that the evaluation attacks.
NUM_SAMPLES = 100


def machine() -> dict[str, str]:
    """Return processor and torch version, because the choice of kernels depends on them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {"processor": ", ".join(sorted(names)), "torch": torch.__version__}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, because rounding of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def golden_recipe(name: str, num_workers: int) -> Recipe:
    """Return a shipped recipe shortened to two epochs."""
    overrides = [
        "training.epochs=2",
        f"training.num_workers={num_workers}",
        "evaluation.validation.num_steps=3",
    ]
    if name == "mnist":
        overrides.append("adversary.eps_warmup_epochs=1")
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def load(recipe: Recipe, data_root: Path | None) -> Dataset:
    """Load the data of the recipe, limited to 2,000 training images for MNIST."""
    data = load_data(recipe.data, data_root or Path())
    if recipe.data.source != "mnist":
        return data
    return replace(
        data, train=stratified(data.train, 2000, seed=0), validation=stratified(data.validation, 200, seed=0)
    )


def train(name: str, folder: Path, data_root: Path | None = None) -> tuple[dict[str, Any], RunFolder]:
    """Run one of TRAININGS; return its figures and its run folder."""
    recipe = golden_recipe(*TRAININGS[name])
    dataset = load(recipe, data_root)
    run = RunFolder.create(
        folder, recipe.name, recipe.digest(), recipe.to_yaml(), {"data_digest": dataset.digest}
    )
    with one_thread():
        outcome = launch(recipe, dataset, run)
    assert outcome.status == "finished", outcome.message
    state, _ = latest_checkpoint(run.checkpoints)
    assert state is not None
    total = hashlib.sha256()
    for key, tensor in sorted(state.model.items()):
        total.update(
            f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes()
        )
    line = state.history[-1]
    figures = {
        "weights": total.hexdigest(),
        "train_loss": line["train_loss"],
        "val_robust_accuracy": line["val_robust_accuracy"],
    }
    return figures, run


def judge(run: RunFolder) -> dict[str, Any]:
    """Evaluate the best model of the run "digits" with every attack of `autoattack`; return its report."""
    recipe = golden_recipe("digits", 0)
    dataset = load(recipe, None)
    source = trained_model(run, recipe, dataset)
    with one_thread():
        found = evaluate(
            EvalSpec(
                source,
                stratified(dataset.test, NUM_SAMPLES, seed=0),
                dataset,
                "autoattack",
                recipe.evaluation.threat_model,
                name="digits",
                split_name=f"{NUM_SAMPLES} test",
                full=True,
                training_threat=training_threat(recipe),
            ),
        )
    report: dict[str, Any] = json.loads(found.report.model_dump_json(exclude={"versions"}))
    return report


def main() -> None:
    """Write the figures for this machine and torch version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("ADVTRAIN_DATA_ROOT"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("the figures of MNIST need --data-root")
    figures: dict[str, Any] = {"machine": machine(), "trainings": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in TRAININGS:
            figures["trainings"][name], run = train(name, Path(folder), Path(arguments.data_root))
            print(name, figures["trainings"][name], flush=True)
            if name == "digits":
                REPORT.write_text(json.dumps(judge(run), indent=1) + "\n")
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
