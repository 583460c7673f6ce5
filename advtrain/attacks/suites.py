"""Attack suites for evaluation by name, with the weakest and cheapest attacks first.

`recipe/suites.py` lists the names and budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from advtrain.attacks.apgd import AutoPGD
from advtrain.attacks.base import FailureSearch
from advtrain.attacks.carlini_wagner import CarliniWagner
from advtrain.attacks.fab import FastAdaptiveBoundary
from advtrain.attacks.pgd import GradientAttack
from advtrain.attacks.rays import RayS
from advtrain.attacks.square import Square
from advtrain.attacks.student import StudentTransfer
from advtrain.recipe.attack import AttackConfig
from advtrain.recipe.suites import split_suite
from advtrain.threat import ThreatModel


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
    return [SEARCHES[kind](*budget) for kind, budget in split_suite(names, norm, SEARCHES)]


def check_suite(attacks: Sequence[FailureSearch], threat: ThreatModel) -> None:
    """Raise a UserError if an attack does not support the threat model."""
    for attack in attacks:
        attack.check(threat)
