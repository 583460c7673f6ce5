"""200 flipped bits over all files of a run folder: each is noticed, or changes nothing that anybody reads."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advtrain.environment import describe_environment
from advtrain.errors import UserError
from advtrain.evaluation.cache import ResultCache
from advtrain.evaluation.worst_case import WorkItem
from advtrain.recipe import load_stored_recipe
from advtrain.runs.checkpoint import latest_checkpoint, load_checkpoint, validated_checkpoints
from advtrain.runs.folder import RunFolder
from advtrain.runs.sealed import sealed_all, unsealed_all
from advtrain.tracking.tracker import Tracker
from advtrain.training.trained_model import require_recipe, trained_model
from tests.kit import digits_data, digits_recipe, train_here

FLIPS = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a finished run with an average, an MLflow run, and cached units of an evaluation."""
    folder = tmp_path_factory.mktemp("flips")
    recipe = digits_recipe("training.keep_checkpoints=3", "optimizer.ema_decay=0.9", "training.epochs=3")
    _, run = train_here(recipe, folder)
    run.update(environment=describe_environment())
    Tracker.start(run, recipe, digits_data(recipe), f"sqlite:///{folder / 'mlflow.db'}")
    run.update(status="finished", trained=True)
    run.append_attempt({"first_step": 0, "nodes": ["a"], "cause": ""})
    run.write_recoveries([{"epoch": 1, "drop": 0.3}, {"epoch": 2, "drop": 0.4}])
    cache = ResultCache(run.evaluations, "unit", {"model": "m"})
    with cache.opened():
        for number in range(6):
            item = WorkItem(np.arange(3), 0, 0, number)
            cache._add(str(number), {"robust": [True, False], "loss": item.block + 0.1})
    return run


def what_is_read(folder: Path) -> dict[str, Any]:
    """Return everything that a command reads of the run.

    Raises:
        UserError: damage was noticed.
    """
    run = RunFolder(folder)
    recipe = load_stored_recipe(run.path / "recipe.yaml")
    state, passed = latest_checkpoint(run.checkpoints)
    if passed or state is None:
        raise UserError("; ".join(passed))
    require_recipe(state, recipe)
    scores = [load_checkpoint(path).score for path in sorted(run.checkpoints.iterdir())]
    cache = ResultCache(run.evaluations, "unit", {"model": "m"})
    with cache.opened():
        units = dict(cache.results)
    weights = hashlib.sha256(trained_model(run, recipe, digits_data(recipe)).content).hexdigest()
    tracked = Tracker.reopen(run, "sqlite:////none.db").state
    found = {key: value for key, value in run.facts().items() if key not in ("digest", "environment")}
    return {
        "recipe": recipe,
        "facts": {key: found.get(key) for key in ("status", "trained", "data_digest", "message")},
        "metrics": run.metrics(),
        "attempts": [(line["first_step"], line["nodes"], line["cause"]) for line in run.attempts()],
        "recoveries": run.recoveries(),
        "tracking": {k: tracked[k] for k in ("uri", "run_id", "experiment_id", "epochs", "status")},
        "units": units,
        "scores": scores,
        "validated": [score for _, score in validated_checkpoints(run.checkpoints)],
        "history": state.history,
        "step": (state.step, state.epoch, state.step_in_epoch),
        "weights": weights,
        "optimizer": {key: value.tolist() for key, value in state.optimizer.items()},
    }


def test_every_flipped_bit_is_noticed_or_harmless(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "_attempt", lambda self, send: True)  # only what is read is compared
    torch.set_num_threads(1)
    expected = what_is_read(run.path)
    files = sorted(p for p in run.path.rglob("*") if p.is_file() and p.name not in ("lock", "progress.json"))
    assert {"run.json", "recipe.yaml", "metrics.jsonl", "units.jsonl", "state.json"} <= {
        p.name for p in files
    }
    draw, outcomes = random.Random(0), {"noticed": 0, "harmless": 0}
    for number in range(FLIPS):
        copy = tmp_path / str(number)
        shutil.copytree(run.path, copy)
        file = copy / draw.choice(files).relative_to(run.path)
        content = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            found = what_is_read(copy)
        except UserError:
            outcomes["noticed"] += 1
        else:
            assert found == expected, f"bit {bit} of {file.name} was flipped and nobody noticed"
            outcomes["harmless"] += 1
        shutil.rmtree(copy)
    assert sum(outcomes.values()) == FLIPS
    assert outcomes["noticed"] >= 0.7 * FLIPS, outcomes


LINES = [{"unit": str(n), "robust": n} for n in range(5)]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:3], {**lines[3], "robust": 99}, lines[4]],
        lambda lines: [*lines[:3], {"unit": "3", "robust": 99}, lines[4]],
        lambda lines: lines[1:],
    ],
)
def test_chained_lines_cannot_be_changed_dropped_doubled_or_swapped(change):
    lines = sealed_all(LINES)
    assert unsealed_all(lines) == LINES
    with pytest.raises(ValueError, match="digest"):
        unsealed_all(change(lines))


def test_records_of_earlier_versions_are_read():
    assert unsealed_all(LINES) == LINES


def test_recipe_that_was_edited_after_training_is_not_evaluated(run, tmp_path):
    """Also if its own digest was made anew: the checkpoint knows with which recipe it was trained."""
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    edited = digits_recipe(
        "training.keep_checkpoints=3", "optimizer.ema_decay=0.9", "training.epochs=3", "seed=9"
    )
    (copy / "recipe.yaml").write_text(edited.to_yaml())
    with pytest.raises(UserError, match="belongs to another recipe"):
        trained_model(RunFolder(copy), load_stored_recipe(copy / "recipe.yaml"), digits_data(edited))
    text = (run.path / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    with pytest.raises(UserError, match="was changed after it was written"):
        load_stored_recipe(copy / "recipe.yaml")
