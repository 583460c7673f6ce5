"""Catastrophic overfitting: notice it within one evaluation, go back to the last good epoch, go on stronger.

A net that trains with one-step attacks can lose, within an epoch, all robustness to attacks of several steps while
it looks ever better against its own (Wong et al. 2020, section 5.4). The validation attack shows it.

What was done is in the run folder's guard.json, one record a collapse, and nowhere else: the settings in force are
the recipe's first len(records) of guard.stronger. Order of a roll-back: later checkpoints go, then the record is
written. A kill between the two leaves a run that trains the same epoch again and notices the same collapse.
"""

from __future__ import annotations

import shutil
from typing import Any

from advtrain.errors import UserError
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import robustness, validated_checkpoints
from advtrain.runs.folder import RunFolder


def watched_drop(recipe: Recipe) -> float | None:
    """Return guard.max_drop if the guard watches this training: one-step attacks overfit, others do not."""
    return recipe.guard.max_drop if recipe.adversary.one_step and recipe.objective.adversarial else None


def collapsed(max_drop: float | None, history: list[dict[str, Any]], line: dict[str, Any]) -> bool:
    """Return whether the epoch of `line` lost more than `max_drop` of the best validation robust accuracy so far."""
    if max_drop is None or "val_robust_accuracy" not in line:
        return False
    best = max((robustness(past) for past in history), default=float("-inf"))
    return robustness(line) < best - max_drop


def roll_back(recipe: Recipe, run: RunFolder, line: dict[str, Any]) -> dict[str, Any]:
    """Go back to the last good epoch's checkpoint and note down with what to go on; return the record.

    Args:
        recipe: as the user wrote it.
        run: the run; on rank 0 only.
        line: the metrics of the epoch that collapsed.
    """
    records = run.recoveries()
    best = max(robustness(past) for past in run.metrics())
    # A validated epoch that had not collapsed: one between validations may have, unseen.
    least = best - (recipe.guard.max_drop or 0.0)
    good = next((path for path, score in validated_checkpoints(run.checkpoints) if score >= least), None)
    if good is None:
        raise UserError(
            f"the guard noticed a collapse, but no sound checkpoint from before is in '{run.checkpoints}'"
        )
    for path in run.checkpoints.glob("step-*"):
        if path.name > good.name:
            shutil.rmtree(path)
    stronger = recipe.guard.stronger[len(records) :]
    undone = [past for past in run.metrics() if past["step"] > int(good.name.removeprefix("step-"))]
    record = {
        "epoch": line["epoch"],
        "step": line["step"],
        "robust_accuracy": line["val_robust_accuracy"],
        "best_before": best,
        "back_to": good.name,
        "seconds_undone": sum(past["epoch_seconds"] for past in [*undone, line]),
        "settings": stronger[0] if stronger else None,
    }
    run.write_recoveries([*records, record])
    return record


def describe(record: dict[str, Any]) -> str:
    """Return a sentence on one collapse."""
    fell = f"{100 * record['best_before']:.1f} to {100 * record['robust_accuracy']:.1f} %"
    then = (
        "guard.stronger has no further setting, so training ended there"
        if record["settings"] is None
        else "went on with " + ", ".join(f"{path}={value}" for path, value in record["settings"].items())
    )
    return (
        f"catastrophic overfitting in epoch {record['epoch']}: validation robust accuracy fell from {fell}; "
        f"back to {record['back_to']}, {then}"
    )
