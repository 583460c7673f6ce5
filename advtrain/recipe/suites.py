"""Names of attack suites for evaluation; `attacks/suites.py` builds the attacks.

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
from collections.abc import Collection

from advtrain.errors import UserError, nearest

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
#: Attacks that ship, and how many numbers their budget has at most.
BUDGETS = {
    "pgd": 2,
    "apgd-ce": 2,
    "apgd-dlr": 2,
    "apgd-t": 2,
    "fab-t": 2,
    "square": 1,
    "rays": 1,
    "student": 2,
    "cw": 2,
    "eot-apgd-ce": 2,
    "eot-apgd-dlr": 2,
    "eot-square": 2,
}


def split_suite(
    names: str, norm: str = "linf", known: Collection[str] = BUDGETS.keys()
) -> list[tuple[str, list[int]]]:
    """Return (attack, budget) of each attack of a suite or of a comma-separated list of names.

    Args:
        names: for example `autoattack` or `apgd-ce-50,square`.
        norm: norm of the threat model; the budgets of a suite depend on it, those of single attacks do not.
        known: names of attacks.

    Raises:
        UserError: an unknown name, or a budget of 0.
    """
    suites = SUITES | L1_SUITES if norm == "l1" else SUITES
    written = [name.strip() for name in names.split(",")]
    return [_split(name, known) for part in written for name in suites.get(part, part).split(",")]


def _split(name: str, known: Collection[str]) -> tuple[str, list[int]]:
    kind, budget = name, ""
    if match := re.fullmatch(r"(.+?)-(\d+(?:x\d+)?)", name):
        kind, budget = match.groups()
    if kind not in known:
        raise UserError(f"unknown attack or suite '{name}'{nearest(kind, {*known, *SUITES})}")
    numbers = [int(n) for n in budget.split("x")] if budget else []
    if 0 in numbers or len(numbers) > BUDGETS.get(kind, 2):
        raise UserError(f"'{name}' has no such budget; write for example pgd-50x5, apgd-t-100 or square-5000")
    return kind, numbers


def check_norm(kind: str, norm: str) -> None:
    """Raise a UserError if an attack does not search for perturbations in `norm`."""
    if kind == "cw" and norm != "l2":
        raise UserError(f"cw searches for small l2 changes, not {norm}; leave it out of the suite")
