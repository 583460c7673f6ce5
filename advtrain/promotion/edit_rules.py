"""Promotion rules of texts that were judged under edits, and floors of the robust accuracy."""

from __future__ import annotations

from advtrain.evaluation import Paired, sign_test
from advtrain.promotion.comparison import NOTHING, Answer, Case


def edit_budget(case: Case) -> Answer:
    """Check that each text was searched with at least the budget of the policy."""
    edits, wanted = case.report.edits, case.policy.edit_budget
    assert edits is not None
    return edits.budget >= wanted, f"{edits.budget:,} queries a text", f"at least {wanted:,} queries a text"


def edit_neighbours(case: Case) -> Answer:
    """Return that the rule is not required: the curve of edits cannot collapse below the radius."""
    points = ", ".join(f"{point.eps:g}: {100 * point.value:.1f} %" for point in case.report.curve)
    return None, f"edits {points}", "not required: the accuracy within fewer edits is never lower"


def min_robust(case: Case) -> Answer:
    """Check the robust accuracy; of texts, the share that was not broken."""
    floor, value = case.policy.min_robust, case.report.robust_accuracy
    return _floor(floor, value, "not broken" if case.report.edits is not None else "robust")


def min_proven(case: Case) -> Answer:
    """Check the share of texts that is proven robust; a report of a ball has none."""
    floor, edits = case.policy.min_proven, case.report.edits
    if edits is None:
        wanted = "not required" if floor is None else f"at least {100 * floor:g} %"
        return None if floor is None else False, "nothing is proven", wanted
    return _floor(floor, edits.proven.value, "proven")


def proven_not_worse(case: Case) -> Answer:
    """Compare the proven shares of challenger and champion with McNemar's test."""
    edits = case.report.edits
    if edits is None or case.policy.min_proven is None:
        return None, "not required", "none"
    threshold = f"not significantly worse: p >= {case.policy.alpha:g} (McNemar, one-sided)"
    proven = [outcomes.proven_edits for outcomes in case.pair or ()]
    if len(proven) != 2 or proven[0] is None or proven[1] is None:
        return None, NOTHING, threshold
    paired = Paired.of(proven[0] >= edits.at_most, proven[1] >= edits.at_most)
    p = sign_test(paired.only_first, paired.only_second)
    figures = f"{100 * paired.second.value:.2f} %, champion {100 * paired.first.value:.2f} %; worse with p = {p:.3g}"
    return p >= case.policy.alpha, figures, threshold


def _floor(floor: float | None, value: float, word: str) -> Answer:
    figures = f"{100 * value:.2f} % {word}"
    if floor is None:
        return None, figures, "not required"
    return value >= floor, figures, f"at least {100 * floor:g} %"
