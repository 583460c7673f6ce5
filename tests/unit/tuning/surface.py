"""A campaign over a known surface: what training would reach is a formula of the point."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tests.kit import digits_recipe
from tuning.campaign import Plan, make_plan, parse_campaign
from tuning.trials import Ledger, Trial

#: The surface's top, where it is 1.
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
    """The surface: 1 at its top, falling with the square of the distance."""
    lr = math.log10(point["optimizer.lr"] / TOP["optimizer.lr"]) / 3
    eps = (point["adversary.eps"] - TOP["adversary.eps"]) / 0.3
    return max(0.0, 1 - lr**2 - eps**2)


def plan_of(changes: dict[str, Any] | None = None, *overrides: str) -> Plan:
    """The campaign on the small digits recipe, with other values for some of its keys."""
    campaign = parse_campaign(CAMPAIGN | (changes or {}), "here")
    return make_plan(campaign, digits_recipe(*overrides), "here", allow_code=False)


def ledger_of(folder: Path, changes: dict[str, Any] | None = None, *overrides: str) -> Ledger:
    """A fresh ledger of it."""
    facts = {"status": "running", "allow_code": False, "environment": {}, "data_digest": "d" * 64}
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
