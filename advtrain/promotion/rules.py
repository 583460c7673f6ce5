"""Promotion rules. Each checks the challenger, alone or against the champion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from advtrain.attacks import build_suite
from advtrain.evaluation import Paired, Report, gain_test, sign_test
from advtrain.promotion.comparison import NOTHING, Answer, Case, covers, different, names_of
from advtrain.promotion.edit_rules import (
    edit_budget,
    edit_neighbours,
    min_proven,
    min_robust,
    proven_not_worse,
)
from advtrain.registry import Finding

#: Suites by name, in increasing strength.
STRENGTH = ("quick", "standard", "autoattack")
INTEGRITY = "every file has the digest recorded at registration, and the report the figures of its samples"
RULES: dict[str, Callable[[Case], Answer]] = {}


def _rule(function: Callable[[Case], Answer]) -> Callable[[Case], Answer]:
    RULES[function.__name__.lstrip("_")] = function
    return function


def judge(case: Case) -> list[Finding]:
    """Apply every rule; for a regression, stop after `task`, which fails."""
    findings = []
    for name, rule in RULES.items():
        holds, figures, threshold = rule(case)
        verdict: Any = "skipped" if holds is None else "passed" if holds else "failed"
        findings.append(Finding(rule=name, verdict=verdict, figures=figures, threshold=threshold))
        if name == "task" and not isinstance(case.challenger.report, Report):
            break
    return findings


def changed_finding(changed: str) -> Finding:
    """Return the failed integrity finding for changed files; it replaces all other rules."""
    return Finding(rule="integrity", verdict="failed", figures=changed, threshold=INTEGRITY)


@_rule
def _integrity(case: Case) -> Answer:
    if case.challenger.contradictions:
        return False, "; ".join(case.challenger.contradictions[:5]), INTEGRITY
    return True, f"{case.challenger.num_files} files unchanged", INTEGRITY


@_rule
def _task(case: Case) -> Answer:
    ours, wanted = case.challenger.report, "same task, input shape and number of classes as the champion"
    if not isinstance(ours, Report):
        return False, "regression", "classification (regressions are not supported)"
    if ours.space == "embedding":
        return False, "evaluated in embeddings, which is no threat model of inputs", "evaluated on inputs"
    if case.champion is None:
        return True, case.challenger.form, wanted
    same = ours.task == case.champion.report.task and case.challenger.form == case.champion.form
    figures = case.challenger.form if same else f"{case.challenger.form}, champion {case.champion.form}"
    return same, figures, wanted


@_rule
def _judged_alike(case: Case) -> Answer:
    threshold = "same data, split, threat model and attacks as the champion"
    if case.champion is None:
        return None, NOTHING, threshold
    if found := different(case.challenger, case.champion):
        return False, "differs in " + ", ".join(found), threshold
    note = "; champion re-evaluated" if case.champion.judged_anew else ""
    return True, f"{case.report.threat} on {case.report.which(case.report.clean.total)}{note}", threshold


@_rule
def _suite(case: Case) -> Answer:
    made = names_of(case.report)
    if case.report.edits is not None:
        return edit_budget(case)
    norm, wanted = case.report.norm, _names(case.policy.suite, case.report.norm)
    stronger = STRENGTH[STRENGTH.index(case.policy.suite) :] if case.policy.suite in STRENGTH else ()
    enough = any(covers(made, names) for names in (wanted, *(_names(suite, norm) for suite in stronger))) or (
        case.policy.suite == "autoattack" and _averaged(case.report) and covers(made, _names("rand", norm))
    )
    return enough, ", ".join(made) or "none", f"{case.policy.suite}: {', '.join(wanted)}"


def _averaged(report: Report) -> bool:
    """Return whether the model is stochastic, and the checks that matter then passed on means over draws.

    For such a model, attacks averaged over draws are the strong ones, as in AutoAttack.
    """
    checks = {check.name: check for check in report.checks}
    stochastic = checks.get("stochastic")
    on_means = (checks.get(name) for name in ("slope", "black_box"))
    return (
        stochastic is not None
        and bool(stochastic.data.get("averages_over_draws"))
        and all(c is not None and c.verdict != "failed" and bool(c.data.get("on_means")) for c in on_means)
    )


def _names(suite: str, norm: str) -> list[str]:
    return [attack.name for attack in build_suite(suite, norm)]


@_rule
def _trust(case: Case) -> Answer:
    failed = [check.name for check in case.report.checks if check.verdict == "failed"]
    return (
        case.report.trust == "trusted",
        ", ".join([case.report.trust, *failed]),
        "trusted: no masking check failed",
    )


@_rule
def _repeated(case: Case) -> Answer:
    found = case.challenger.repetition
    wanted = f"{case.policy.repeat_units} work items of the evaluation give the recorded results"
    if case.policy.repeat_units == 0 or found is None:
        return None, "not repeated", wanted
    figures = found.reason or f"{found.differing:,} of {found.compared:,} samples differ"
    return found.agrees, figures, wanted


@_rule
def _samples(case: Case) -> Answer:
    total = case.report.robust.total
    return total >= case.policy.min_samples, f"{total:,}", f"at least {case.policy.min_samples:,}"


@_rule
def _robust_not_worse(case: Case) -> Answer:
    threshold = f"not significantly worse: p >= {case.policy.alpha:g} (McNemar, one-sided)"
    if case.pair is None:
        return None, NOTHING, threshold
    paired = Paired.of(case.pair[0].robust, case.pair[1].robust)
    p = sign_test(paired.only_first, paired.only_second)
    return p >= case.policy.alpha, f"{_gap(paired)}; worse with p = {p:.3g}", threshold


@_rule
def _robust_gain(case: Case) -> Answer:
    policy = case.policy
    if policy.min_gain is None:
        return None, "not required", "none"
    asked = f"better by more than {100 * policy.min_gain:g} points" if policy.min_gain > 0 else "better"
    if policy.min_gain < 0:
        asked = f"at most {-100 * policy.min_gain:g} points worse"
    threshold = f"significant: {asked}, p < {policy.alpha:g} (paired test)"
    if case.pair is None:
        return None, NOTHING, threshold
    paired = Paired.of(case.pair[0].robust, case.pair[1].robust)
    p = gain_test(paired.only_second, paired.only_first, paired.first.total, policy.min_gain)
    return p < policy.alpha, f"{_gap(paired)}; p = {p:.3g}", threshold


@_rule
def _clean_drop(case: Case) -> Answer:
    most = case.policy.max_clean_drop
    if most is None or case.pair is None:
        return None, "not required" if most is None else NOTHING, "none"
    paired = Paired.of(case.pair[0].clean, case.pair[1].clean)
    lost = paired.first.count - paired.second.count
    # Compare counts, so that a drop of exactly the threshold passes despite rounding.
    return (
        lost <= most * paired.first.total + 1e-9,
        f"{100 * paired.second.value:.2f} %, champion {100 * paired.first.value:.2f} %",
        f"at most {100 * most:g} points lower",
    )


@_rule
def _worst_class(case: Case) -> Answer:
    floor = case.policy.min_worst_class
    worst = min(case.report.per_class, key=lambda figure: figure.robust.value)
    figures = f"class {worst.full_name}: {100 * worst.robust.value:.2f} % robust"
    if floor is None:
        return None, figures, "not required"
    return worst.robust.value >= floor, figures, f"at least {100 * floor:g} %"


@_rule
def _neighbours(case: Case) -> Answer:
    share = case.policy.min_neighbour_share
    if share is None:
        return None, "not required", "none"
    if case.report.edits is not None:
        return edit_neighbours(case)
    threshold = (
        f"at {_listed(case.policy.neighbours)} times the radius, at least {100 * share:g} % of the robust accuracy "
        "at the radius"
    )
    curve = {round(p.eps / case.report.eps, 6): p for p in case.report.curve} if case.report.eps else {}
    wanted = [1.0, *case.policy.neighbours]
    if any(factor not in curve for factor in wanted):
        return False, "the report has no robust accuracy at these radii", threshold
    theirs = {}
    if case.champion is not None and case.pair is not None and case.champion.report.eps:
        theirs = {round(p.eps / case.champion.report.eps, 6): p.value for p in case.champion.report.curve}
    figures = ", ".join(f"x{factor:g}: {100 * curve[factor].value:.1f} %" for factor in wanted)
    collapsed = [
        factor
        for factor in case.policy.neighbours
        if curve[factor].value < share * curve[1.0].value - 1e-12
        and curve[factor].high < theirs.get(factor, 1.0)
    ]
    return not collapsed, figures, threshold + ", or not below the champion"


for _function in (min_robust, min_proven, proven_not_worse):
    _rule(_function)


@_rule
def _calibration(case: Case) -> Answer:
    error, most = case.report.calibration_error, case.policy.max_calibration_error
    figures = "not measured" if error is None else f"{error:.4f}"
    if most is None:
        return None, figures, "not required"
    return error is not None and error <= most, figures, f"at most {most:g}"


@_rule
def _latency(case: Case) -> Answer:
    time, most = case.challenger.latency_ms, case.policy.max_latency_ms
    return (None if most is None else time <= most), f"{time:.2f} ms", _at_most(most, "ms")


@_rule
def _size(case: Case) -> Answer:
    size, most = case.challenger.size_mb, case.policy.max_size_mb
    return (None if most is None else size <= most), f"{size:.3f} MB", _at_most(most, "MB")


@_rule
def _signature(case: Case) -> Answer:
    threshold = "same as the champion, or change approved by the policy"
    if case.champion is None:
        return None, NOTHING, threshold
    same = case.challenger.signature == case.champion.signature
    return same or case.policy.approve_signature_change, "same" if same else "changed", threshold


@_rule
def _provenance(case: Case) -> Answer:
    run, missing = case.challenger.run, []
    if run.get("status") != "FINISHED":
        missing.append(f"run {run.get('status', 'unknown').lower()}")
    if case.policy.clean_git and "commit" not in run:
        missing.append("no git commit")
    elif case.policy.clean_git and run.get("dirty") != "false":
        missing.append("uncommitted changes")
    if "data_digest" not in run:
        missing.append("no data digest")
    missing += [f"pickle: {name}" for name in case.challenger.pickles]
    unknown = case.challenger.lineage.check().unknown
    refuses = case.policy.provenance.unknown_ancestors == "refuse"
    missing += unknown if refuses else []
    figures = "; ".join(missing) or f"commit {run.get('commit', 'none')[:10]}, data {run['data_digest'][:10]}"
    if unknown and not refuses:
        figures += f"; {'; '.join(unknown)}"
    commit = "clean commit, " if case.policy.clean_git else ""
    known = ", ancestors known" if refuses else ""
    return not missing, figures, f"run finished, {commit}data digest, no pickle{known}"


@_rule
def _leaks(case: Case) -> Answer:
    lineage, threshold = case.challenger.lineage, "no ancestor was trained on a validation or test sample"
    if lineage.allowed_leak is not None:
        return False, f"a leak was allowed at the training: {lineage.allowed_leak}", threshold
    if not lineage.ancestors:
        return None, "no ancestors", threshold
    found = lineage.check().leaks
    names = ", ".join(ancestor.reference for ancestor in lineage.ancestors)
    return not found, "; ".join(map(str, found)) or f"none, ancestors: {names}", threshold


def _gap(paired: Paired) -> str:
    gap = 100 * (paired.second.value - paired.first.value)
    return f"{100 * paired.second.value:.2f} %, {gap:+.2f} points ({paired.only_second} against {paired.only_first})"


def _at_most(most: float | None, unit: str) -> str:
    return "not required" if most is None else f"at most {most:g} {unit}"


def _listed(factors: list[float]) -> str:
    return " and ".join(f"{factor:g}" for factor in factors)
