"""Guard: detect catastrophic overfitting, roll back, and resume with stronger settings.

A network trained with one-step attacks can lose all robustness to multi-step attacks within one epoch, while it still
improves against its training attack (Wong et al. 2020, section 5.4). The validation attack detects this.

The only state is the run folder's guard.json, with one record per collapse. The first len(records) entries of the
recipe's guard.stronger are in force. A roll-back deletes later checkpoints and then writes the record. If it is killed
in between, the run trains the same epoch again and detects the same collapse.
"""

from __future__ import annotations

import shutil
from typing import Any

from advtrain.errors import UserError
from advtrain.recipe import AdversaryConfig, Recipe
from advtrain.runs.checkpoint import robustness, validated_checkpoints
from advtrain.runs.folder import RunFolder

#: Remedy for a training whose loss, gradient or metrics are not finite.
ADVICE = (
    "the last good checkpoint is kept. Lower optimizer.lr, set optimizer.clip_norm, or warm up with "
    "optimizer.schedule.warmup_epochs or adversary.eps_warmup_epochs"
)


def watched_drop(recipe: Recipe) -> float | None:
    """Return guard.max_drop if training uses one-step attacks, which can overfit, else None."""
    return recipe.guard.max_drop if recipe.adversary.one_step and recipe.objective.adversarial else None


def collapsed(
    max_drop: float | None, history: list[dict[str, Any]], line: dict[str, Any], adversary: AdversaryConfig
) -> bool:
    """Return whether the epoch's robust accuracy is over `max_drop` below the best in `history`."""
    if max_drop is None or "val_robust_accuracy" not in line:
        return False
    best = max(map(robustness, _watched(history, adversary)), default=float("-inf"))
    return bool(_watched([line], adversary)) and robustness(line) < best - max_drop


def _watched(lines: list[dict[str, Any]], adversary: AdversaryConfig) -> list[dict[str, Any]]:
    """Return the metrics of the epochs that began after eps_delay_epochs.

    The epochs before train on clean inputs. A network that was robust at the start loses robustness there by design.
    """
    return [line for line in lines if line["epoch"] - 1 >= adversary.eps_delay_epochs]


def roll_back(
    recipe: Recipe, run: RunFolder, line: dict[str, Any], adversary: AdversaryConfig
) -> dict[str, Any]:
    """Roll back to the last good checkpoint and record the collapse; return the record.

    Args:
        recipe: as the user wrote it.
        run: folder of the run; call this on rank 0 only.
        line: the metrics of the epoch that collapsed.
        adversary: the training attack of that epoch.
    """
    records = run.recoveries()
    best = max(map(robustness, _watched(run.metrics(), adversary)))
    # Only validated epochs: an epoch between validations may have collapsed unseen.
    least = best - (recipe.guard.max_drop or 0.0)
    good = next((path for path, score in validated_checkpoints(run.checkpoints) if score >= least), None)
    if good is None:
        raise UserError(
            f"the guard detected a collapse, but there is no earlier intact checkpoint in '{run.checkpoints}'"
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
    """Return a sentence that describes one collapse."""
    fell = f"{100 * record['best_before']:.1f} to {100 * record['robust_accuracy']:.1f} %"
    then = (
        "guard.stronger has no further entry, so training ended there"
        if record["settings"] is None
        else "resumed with " + ", ".join(f"{path}={value}" for path, value in record["settings"].items())
    )
    return (
        f"catastrophic overfitting in epoch {record['epoch']}: validation robust accuracy fell from {fell}; "
        f"rolled back to {record['back_to']}, {then}"
    )
