"""Contradictions in report.json, and between its figures and samples.parquet."""

from __future__ import annotations

import numpy as np

from advtrain.evaluation import Report
from advtrain.evaluation.edit_figures import EditFigures
from advtrain.evaluation.edits import attack_name
from advtrain.evaluation.statistics import Share
from advtrain.promotion.comparison import names_of
from advtrain.promotion.evidence import Outcomes


def contradictions(report: Report, outcomes: Outcomes) -> list[str]:
    """Return a sentence for each figure that differs from the samples or the block of edits."""
    n = len(outcomes.labels)
    broken = np.array([name or "" for name in outcomes.broken_by], dtype=object)
    found = []
    if not np.array_equal(outcomes.robust, np.equal(broken, "")):
        found.append("samples are robust and broken at once")
    if not np.array_equal(outcomes.clean, np.not_equal(broken, "clean")):
        found.append("samples are misclassified and correct at once")
    figures = {"clean": outcomes.clean, "robust": outcomes.robust}
    for kind, flags in figures.items():
        wanted = Share.of(flags)
        if getattr(report, kind) != wanted or getattr(report, f"{kind}_accuracy") != wanted.value:
            stated = getattr(report, f"{kind}_accuracy")
            found.append(f"the report says {kind} accuracy {stated:g}, the samples {wanted.value:g}")
    if report.edits is not None:
        found += [*_settings(report, report.edits), *_edits(report.edits, outcomes)]
    for figure in report.per_class:
        of_class = outcomes.labels == figure.label
        if any(getattr(figure, kind) != Share.of(flags[of_class]) for kind, flags in figures.items()):
            found.append(f"the figures of class {figure.full_name} differ from its samples")
    if {figure.label for figure in report.per_class} != set(outcomes.labels.tolist()):
        found.append("the report leaves out classes of its samples")
    standing = int(outcomes.clean.sum())
    for attack in report.attacks:
        fallen = int(np.equal(broken, attack.name).sum())
        if (attack.num_attacked, attack.num_broken) != (standing, fallen):
            found.append(f"{attack.name} broke {fallen} samples, the report says {attack.num_broken}")
        standing -= fallen
        if attack.robust != Share.of(np.arange(n) < standing):
            found.append(
                f"after {attack.name} {standing} samples are robust, the report says {attack.robust.count}"
            )
    return found


def _settings(report: Report, edits: EditFigures) -> list[str]:
    """Return one sentence for each fact of the report that contradicts its block of edits."""
    search = attack_name(edits.budget)
    wanted = {"attacks": [search], "suite": search, "norm": edits.edits, "eps": float(edits.at_most)}
    stated = {name: getattr(report, name) for name in wanted} | {"attacks": names_of(report)}
    return [
        f"the report says {name} {stated[name]}, its edits {value}"
        for name, value in wanted.items()
        if stated[name] != value
    ]


def _edits(edits: EditFigures, outcomes: Outcomes) -> list[str]:
    """Return one sentence for each bound of the robust accuracy that differs from the samples."""
    if outcomes.proven_edits is None:
        return ["the samples have no column proven_edits"]
    proven, found = outcomes.proven_edits >= edits.at_most, []
    if edits.proven != Share.of(proven):
        found.append(
            f"the report says {edits.proven.count} texts are proven, the samples {int(proven.sum())}"
        )
    if edits.not_broken != Share.of(outcomes.robust):
        robust = int(outcomes.robust.sum())
        found.append(f"the report says {edits.not_broken.count} texts are not broken, the samples {robust}")
    if (proven & ~outcomes.robust).any():
        found.append("texts are proven and broken at once")
    return found
