"""Attack suites for evaluation by name, with the weakest and cheapest attacks first.

- `quick`: pgd-20
- `standard`: apgd-ce, apgd-t
- `autoattack`: apgd-ce, apgd-t, fab-t, square, with the budgets of AutoAttack (Croce & Hein 2020, arXiv 2003.01690)
- `rand`: eot-apgd-ce, eot-apgd-dlr, eot-square, for stochastic models; each step averages over 20 draws

As in AutoAttack, `standard` and `autoattack` take 5 starts of apgd-ce and 5 targets of apgd-t for l1; else 1 and 9.

A suite is also a comma-separated list of attacks and suites. Attacks are pgd-50x5 (steps, restarts), and apgd-ce,
apgd-dlr, apgd-t and fab-t with 100 steps, 1 start and 9 targets, square with 5,000 queries, and cw (l2) with 200 steps
and 5 searches. rays and student see only the predicted class. Numbers set another budget: apgd-ce-50, apgd-t-50x3,
square-1000, cw-1000x9, rays-500 (queries), student-50x20 (steps, epochs), eot-apgd-ce-50x10 (steps, draws),
eot-square-500x10 (queries, draws).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from advtrain.attacks.apgd import AutoPGD
from advtrain.attacks.base import FailureSearch
from advtrain.attacks.carlini_wagner import CarliniWagner
from advtrain.attacks.config import AttackConfig
from advtrain.attacks.fab import FastAdaptiveBoundary
from advtrain.attacks.pgd import GradientAttack
from advtrain.attacks.rays import RayS
from advtrain.attacks.square import Square
from advtrain.attacks.student import StudentTransfer
from advtrain.errors import UserError, nearest
from advtrain.threat import ThreatModel

SUITES = {
    "quick": "pgd-20",
    "standard": "apgd-ce,apgd-t",
    "autoattack": "apgd-ce,apgd-t,fab-t,square",
    "rand": "eot-apgd-ce,eot-apgd-dlr,eot-square",
}
#: Suites that differ for l1.
L1_SUITES = {
    "standard": "apgd-ce-100x5,apgd-t-100x5",
    "autoattack": "apgd-ce-100x5,apgd-t-100x5,fab-t,square",
}


def _pgd(num_steps: int = 20, num_restarts: int = 1) -> GradientAttack:
    values = {"num_steps": num_steps, "num_restarts": num_restarts}
    return GradientAttack(AttackConfig.model_validate(values))


#: Attack builders by name. The arguments are the budget: steps and restarts, targets or draws; or queries.
SEARCHES: dict[str, Callable[..., FailureSearch]] = {
    "pgd": _pgd,
    "apgd-ce": lambda steps=100, restarts=1: AutoPGD("ce", num_steps=steps, num_restarts=restarts),
    "apgd-dlr": lambda steps=100, restarts=1: AutoPGD("dlr", num_steps=steps, num_restarts=restarts),
    "apgd-t": lambda steps=100, targets=9: AutoPGD("t", num_steps=steps, num_targets=targets),
    "fab-t": lambda steps=100, targets=9: FastAdaptiveBoundary(steps, targets),
    "square": lambda queries=5000: Square(queries),
    "rays": lambda queries=2000: RayS(queries),
    "student": lambda steps=50, epochs=20: StudentTransfer(steps, epochs),
    "cw": lambda steps=200, searches=5: CarliniWagner(steps, searches),
    "eot-apgd-ce": lambda steps=100, draws=20: AutoPGD("ce", num_steps=steps, num_draws=draws),
    "eot-apgd-dlr": lambda steps=100, draws=20: AutoPGD("dlr", num_steps=steps, num_draws=draws),
    "eot-square": lambda queries=1000, draws=20: Square(queries, num_draws=draws),
}


def build_suite(names: str, norm: str = "linf") -> list[FailureSearch]:
    """Build the attacks of a suite or of a comma-separated list of names.

    The budgets of a suite depend on `norm`, those of single attacks do not.

    Raises:
        UserError: an unknown name, or a budget of 0.
    """
    suites = SUITES | L1_SUITES if norm == "l1" else SUITES
    written = [name.strip() for name in names.split(",")]
    return [_build(name) for part in written for name in suites.get(part, part).split(",")]


def check_suite(attacks: Sequence[FailureSearch], threat: ThreatModel) -> None:
    """Raise a UserError if an attack does not support the threat model."""
    for attack in attacks:
        attack.check(threat)


def _build(name: str) -> FailureSearch:
    kind, budget = name, ""
    if match := re.fullmatch(r"(.+?)-(\d+(?:x\d+)?)", name):
        kind, budget = match.groups()
    if kind not in SEARCHES:
        raise UserError(f"unknown attack or suite '{name}'{nearest(kind, {*SEARCHES, *SUITES})}")
    numbers = [int(n) for n in budget.split("x")] if budget else []
    if 0 in numbers or (kind in ("square", "rays") and len(numbers) > 1):
        raise UserError(f"'{name}' has no such budget; write for example pgd-50x5, apgd-t-100 or square-5000")
    return SEARCHES[kind](*numbers)
