"""Measure the cost of a training step of every shipped method and compare it with its bound in passes.

    python -m tests.benchmarks.bench_methods --data-root DIR [--rounds N]

The setup is MNIST, cnn4, batch 100 and the methods of the study `losses`. A pass is one forward and one backward
through the network. A standard step is one pass and the optimizer's update. A bound counts the passes that the
definition of the method needs: k for an attack of k steps, 2 for each gradient that is differentiated again, and so
on. A pass of an attack computes no weight gradient, so most methods stay below their bound. All methods take turns
in one process. Each is compared with the standard steps of the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from advtrain.data import Dataset, load_data
from advtrain.models import build_model
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import TrainState, save_checkpoint
from advtrain.runs.folder import RunFolder
from tests.benchmarks.bench_train import our_steps
from tuning.study.grid import cells, load_study

STUDY = Path(__file__).parents[2] / "pipelines" / "studies" / "losses.yaml"
LIMIT = 1.25

#: Number of passes as a function of the attack steps k.
BOUNDS: dict[str, Callable[[int], float]] = {
    "standard": lambda k: 1,
    "madry": lambda k: k + 1,
    "mixed": lambda k: k + 2,
    "trades": lambda k: k + 2,  # plus the clean forward of the attack, a third of a pass
    "mart": lambda k: k + 2,
    "alp": lambda k: k + 2,
    "margin": lambda k: k + 1,
    "label_smoothing": lambda k: k + 1,
    "random_labels": lambda k: k + 1,
    "worst_labels": lambda k: k + 1,
    "hat": lambda k: k + 3,  # plus two forwards without a backward, of attack and teacher
    "llr": lambda k: (
        (k + 1) + (2 + 1)
    ),  # the attack needs the clean gradient; 2: gradient differentiated again
    "cure": lambda k: 2 + 2,
    "input_gradient": lambda k: 2,
    "fgsm_rs": lambda k: 2,
    "n_fgsm": lambda k: 2,
    "grad_align": lambda k: 2 + 1 + 2,
    "free": lambda k: k,  # k replays; 1 for each update of the weights
    "friendly": lambda k: k + 1,
    "awp": lambda k: k + 2,
    "sam": lambda k: k + 2,
}


def recipes() -> dict[str, Recipe]:
    """Return the recipe of each method of the study on cnn4, without warm-up."""
    study = load_study(STUDY, quick=False)
    on_mnist = [c for c in cells(study, quick=False, allow_code=False) if c.row[:2] == ("mnist", "cnn2")]
    changed = {"adversary.eps_warmup_epochs": 0.0, "model.name": "cnn4", "training.batch_size": 100}
    found = {}
    for cell in on_mnist:
        if cell.seed == study.seeds[0]:
            values = cell.recipe.model_dump(mode="json", exclude_none=True)
            for path, value in changed.items():
                section, key = path.split(".")
                values[section][key] = value
            found[cell.method] = Recipe.model_validate(values)
    return found


def teacher(recipe: Recipe, dataset: Dataset, folder: Path) -> str:
    """Create a run folder with an untrained model; training it would not change the time."""
    run = RunFolder.create(
        folder, "teacher", recipe.digest(), recipe.to_yaml(), {"data_digest": dataset.digest}
    )
    model = build_model(recipe.model, dataset.shape, dataset.num_classes)
    save_checkpoint(TrainState(0, 0, 0, recipe.digest(), model.state_dict(), {}), run.checkpoints, 1)
    return str(run.path)


def timed(loop: Iterator[object], count: int) -> float:
    """Return the seconds per step."""
    started = time.perf_counter()
    for _ in range(count):
        next(loop)
    return (time.perf_counter() - started) / count


def main() -> None:
    """Print the table; exit with 1 if a method is above LIMIT times its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    found = recipes()
    assert set(found) == set(BOUNDS), set(found) ^ set(BOUNDS)
    dataset = load_data(found["standard"].data, arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        values = found["hat"].model_dump(mode="json", exclude_none=True)
        values["objective"]["teacher"] = teacher(found["standard"], dataset, Path(folder))
        found["hat"] = Recipe.model_validate(values)
        loops = {name: our_steps(recipe, dataset) for name, recipe in found.items()}
        for loop in loops.values():
            timed(loop, 2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    ratios: dict[str, list[float]] = {name: [] for name in loops}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            before = timed(loops["standard"], 3)
            took = timed(loop, 2)
            standard = (before + timed(loops["standard"], 3)) / 2
            ratios[name].append(took / standard)
            seconds[name].append(took)
    print(f"{'method':16} {'ms a step':>10} {'standard steps':>15} {'bound':>6} {'of bound':>9}")
    worst = 0.0
    for name in loops:
        ratio, bound = statistics.median(ratios[name]), BOUNDS[name](found[name].adversary.num_steps)
        worst = max(worst, ratio / bound)
        took = 1000 * statistics.median(seconds[name])
        print(f"{name:16} {took:10.1f} {ratio:15.2f} {bound:6g} {ratio / bound:9.2f}")
    print(f"largest share of a bound: {worst:.2f} (limit {LIMIT})")
    if worst > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
