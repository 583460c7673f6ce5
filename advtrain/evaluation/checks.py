"""A verdict on a report, and the two checks that need no further pass through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from advtrain.evaluation.statistics import surely_above
from advtrain.evaluation.worst_case import SampleResults
from advtrain.threat import ThreatModel


class Check(BaseModel):
    """One verdict. `advice` says what to do about it, and is empty where all is well."""

    model_config = ConfigDict(frozen=True)
    name: str
    question: str
    verdict: Literal["passed", "warning", "failed", "skipped"]
    evidence: str
    advice: str = ""
    data: dict[str, bool | float] = Field(default_factory=dict, exclude_if=lambda data: not data)
    """what code decides on: evidence is for people"""


def training_radius(trained: ThreatModel | None, judged: ThreatModel) -> Check:
    """Was the model trained at the radius at which it is judged? A warning, since a smaller one is a choice that
    campaigns search over, and the accuracy at the radius of the evaluation is measured all the same."""
    facts = {
        "name": "training_radius",
        "question": "Was the model trained for the radius at which it is judged?",
    }
    if trained is None:
        return Check(**facts, verdict="skipped", evidence="how it was trained is not known")
    evidence = f"trained at {trained}, judged at {judged}"
    if trained.norm != judged.norm:
        advice = "robustness in one norm says little of another: train in the judged one, or evaluate in both"
        return Check(**facts, verdict="warning", evidence=evidence, advice=advice)
    if trained.eps < judged.eps:
        advice = (
            "robustness beyond the training radius is often an attack's weakness: train at the judged radius"
        )
        return Check(**facts, verdict="warning", evidence=evidence, advice=advice)
    return Check(**facts, verdict="passed", evidence=evidence)


def beats_guessing(samples: SampleResults, class_names: Sequence[str] | None) -> Check:
    """Does the model more than to say the same always? A warning: its figure is true, but a constant has one, too."""
    counts, stood = np.bincount(samples.labels), int(samples.robust.sum())
    often, total = int(counts.argmax()), len(samples.labels)
    name, share = class_names[often] if class_names else often, counts[often] / total
    fine = surely_above(stood, total, share)
    return Check(
        name="beats_guessing",
        question="Is the model surely more robust than one that always gives the same answer?",
        verdict="passed" if fine else "warning",
        evidence=f"{100 * stood / total:.1f} % stood; {100 * share:.1f} % are '{name}'",
        advice=""
        if fine
        else "train longer, or against a smaller radius; if it is close, evaluate more samples",
    )
