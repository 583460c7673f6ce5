"""A campaign over a known surface: a formula of the point replaces the result of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tests.kit import digits_recipe
from tuning.campaign import Plan, make_plan, parse_campaign
from tuning.trials import Ledger, Trial

#: Location of the maximum of the surface, which is 1.
TOP = {"optimizer.lr": 3e-3, "adversary.eps": 0.15}

CAMPAIGN: dict[str, Any] = {
    "name": "surface",
    "recipe": "digits",
    "space": {
        "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
        "adversary.eps": {"uniform": [0.0, 0.3]},
    },
    "objectives": {"robust_accuracy": "max"},
    "search": {"algorithm": "tpe"},
    "scheduler": {"kind": "none"},
    "budget": {"trials": 40},
    "register": {"top": 0},
}


def height(point: dict[str, Any]) -> float:
    """Return the surface at a point: 1 at the maximum, decreasing with the squared distance."""
    lr = math.log10(point["optimizer.lr"] / TOP["optimizer.lr"]) / 3
    eps = (point["adversary.eps"] - TOP["adversary.eps"]) / 0.3
    return max(0.0, 1 - lr**2 - eps**2)


def plan_of(changes: dict[str, Any] | None = None, *overrides: str) -> Plan:
    """Return the plan of the campaign on the small digits recipe, with changed keys."""
    campaign = parse_campaign(CAMPAIGN | (changes or {}), "here")
    return make_plan(campaign, digits_recipe(*overrides), "here", allow_code=False)


def ledger_of(folder: Path, changes: dict[str, Any] | None = None, *overrides: str) -> Ledger:
    """Create a new ledger of the campaign."""
    facts = {"status": "running", "environment": {}, "data_digest": "d" * 64}
    return Ledger.create(folder, plan_of(changes, *overrides), facts)


def show(trial: Trial, *figures: tuple[float, float], first: int = 1) -> None:
    """Write (robust, clean) accuracies of epochs as training would."""
    for epoch, (robust, clean) in enumerate(figures, first):
        line = {
            "epoch": epoch,
            "val_robust_accuracy": robust,
            "val_clean_accuracy": clean,
            "epoch_seconds": 1.0,
        }
        trial.run.append_metrics(line)
