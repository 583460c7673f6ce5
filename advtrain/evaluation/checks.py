"""Verdict of a check, and the two checks that need no further forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from advtrain.evaluation.statistics import surely_above
from advtrain.evaluation.worst_case import SampleResults
from advtrain.threat import ThreatModel


class Check(BaseModel):
    """Verdict of one check. `advice` states what to do; it is empty if nothing has to be done."""

    model_config = ConfigDict(frozen=True)
    name: str
    question: str
    verdict: Literal["passed", "warning", "failed", "skipped"]
    evidence: str
    advice: str = ""
    data: dict[str, bool | float] = Field(default_factory=dict, exclude_if=lambda data: not data)
    """machine-readable results; `evidence` is for readers only"""


def training_radius(trained: ThreatModel | None, judged: ThreatModel) -> Check:
    """Compare the training threat model with the evaluation threat model.

    A difference is only a warning. Campaigns may search over smaller training radii, and the robust accuracy is
    measured at the evaluation radius in any case.
    """
    facts = {
        "name": "training_radius",
        "question": "Was the model trained at the radius of the evaluation?",
    }
    if trained is None:
        return Check(**facts, verdict="skipped", evidence="the training threat model is unknown or no ball")
    evidence = f"trained at {trained}, evaluated at {judged}"
    if (trained.norm, trained.group) != (judged.norm, judged.group):
        advice = "one norm's robustness does not imply another's: train in the evaluation norm, or evaluate in both"
        return Check(**facts, verdict="warning", evidence=evidence, advice=advice)
    if trained.eps < judged.eps:
        advice = (
            "robustness beyond the training radius often means a weak attack: train at the evaluation radius"
        )
        return Check(**facts, verdict="warning", evidence=evidence, advice=advice)
    return Check(**facts, verdict="passed", evidence=evidence)


#: Square may break this share of the samples that gradient attacks left, and this share of all samples.
SQUARE_SHARE, SQUARE_SHARE_OF_ALL = 0.01, 0.1


def square_record(samples: SampleResults) -> Check:
    """Compare what Square broke with what the gradient attacks of the suite left.

    As in AutoAttack's flags: a random search should add little to attacks that see the gradient.
    """
    facts = {
        "name": "square_record",
        "question": "Does Square break few of the samples that the gradient attacks left?",
    }
    found = [a for number, a in enumerate(samples.attacks) if number and "square" in a.name]
    if not found:
        return Check(**facts, verdict="skipped", evidence="the suite has no Square after gradient attacks")
    broken, left = sum(a.num_broken for a in found), found[0].num_attacked
    evidence, data = f"it broke {broken} of {left} samples", {"broken": broken, "left": left}
    if not surely_above(broken, left, SQUARE_SHARE):
        return Check(**facts, verdict="passed", evidence=evidence, data=data)
    advice = "gradients are masked in part, so more samples may fall: add rays and student to the suite"
    fails = surely_above(broken, len(samples.labels), SQUARE_SHARE_OF_ALL)
    verdict: Any = "failed" if fails else "warning"
    return Check(**facts, verdict=verdict, evidence=evidence, advice=advice, data=data)


def beats_guessing(samples: SampleResults, class_names: Sequence[str] | None) -> Check:
    """Compare the robust accuracy with that of always predicting the most frequent class.

    A failure is only a warning: the robust accuracy is correct, but a constant prediction is as good.
    """
    counts, stood = np.bincount(samples.labels), int(samples.robust.sum())
    often, total = int(counts.argmax()), len(samples.labels)
    name, share = class_names[often] if class_names else often, counts[often] / total
    fine = surely_above(stood, total, share)
    return Check(
        name="beats_guessing",
        question="Is the model significantly more robust than a constant prediction?",
        verdict="passed" if fine else "warning",
        evidence=f"{100 * stood / total:.1f} % are robust; {100 * share:.1f} % have the label '{name}'",
        advice=""
        if fine
        else "train longer or at a smaller radius; if the difference is small, evaluate more samples",
        data={"robust": stood / total, "most_frequent_label": float(share)},
    )
