"""Policy of the gate: a versioned YAML file of thresholds, with a digest for the audit log."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from advtrain.attacks import build_suite
from advtrain.documents import read_yaml
from advtrain.errors import UserError
from advtrain.evaluation import CURVE_FACTORS
from advtrain.recipe.explain import explain_all
from advtrain.schema import Config, Number


class Provenance(Config):
    """Requirements on the origin of a model."""

    unknown_ancestors: Literal["allow", "refuse"] = "refuse"
    """whether a model may be promoted if the training data of an ancestor is unknown, such as that of a downloaded
    file: nobody can check then that its test samples were not trained on"""


class Policy(Config):
    """Thresholds of the gate. Accuracies are in [0, 1]; null disables a rule."""

    name: str
    """name of the policy in recorded decisions"""
    version: int = Field(ge=1)
    """version of the policy; increase it with every change"""
    description: str = ""
    """purpose of the policy"""
    signed: Literal["optional", "required"] = "optional"
    """whether every decision that moves an alias must be signed with the gate's key"""
    public_key: str | None = None
    """public key of the gate, as PEM text or the path of a PEM file; null: the file of $ADVTRAIN_PUBLIC_KEY"""
    suite: str = "autoattack"
    """attacks that the challenger's report must contain, with at least these budgets"""
    repeat_units: int = Field(default=2, ge=0)
    """work items of the evaluation that the gate runs again at random and compares with the report; 0: none"""
    min_samples: int = Field(default=300, ge=1)
    """minimum number of evaluated test samples"""
    alpha: Number = Field(default=0.05, gt=0, lt=0.5)
    """significance level of the one-sided paired tests"""
    min_gain: Number | None = Field(default=0.0, gt=-1, lt=1)
    """minimum gain in robust accuracy over the champion, tested for significance; negative: accepted loss; null: off,
    so that only `robust_not_worse` applies"""
    max_clean_drop: Number | None = Field(default=0.01, ge=0, le=1)
    """largest accepted drop of clean accuracy below the champion's"""
    min_worst_class: Number | None = Field(default=0.01, ge=0, le=1)
    """minimum robust accuracy of the worst class"""
    min_robust: Number | None = Field(default=None, ge=0, le=1)
    """minimum robust accuracy; of texts, the share that was not broken"""
    min_proven: Number | None = Field(default=None, ge=0, le=1)
    """texts under edits: minimum share that is proven robust; significantly below the champion's also fails"""
    edit_budget: int = Field(default=1000, ge=1)
    """texts under edits: minimum budget of queries of a text in the challenger's report"""
    neighbours: list[Number] = Field(default=[0.75, 1.25], min_length=1)
    """radii of the robustness curve, in multiples of the evaluation radius, where robustness must not collapse"""
    min_neighbour_share: Number | None = Field(default=0.5, ge=0, le=1)
    """minimum robust accuracy at a neighbour, as a share of that at the evaluation radius; matching the champion also
    passes"""
    max_calibration_error: Number | None = Field(default=None, ge=0, le=1)
    """maximum expected calibration error of the clean predictions"""
    max_latency_ms: Number | None = Field(default=None, gt=0)
    """maximum time for one sample, in ms: shortest of several passes on the machine of the gate"""
    max_size_mb: Number | None = Field(default=None, gt=0)
    """maximum total size of the model's files, in 10^6 bytes"""
    approve_signature_change: bool = False
    """whether the input and output signature may differ from the champion's"""
    clean_git: bool = True
    """whether the run must come from a clean git commit"""
    provenance: Provenance = Provenance()
    """what must be known about the models whose weights the run started from, or that taught it"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = [f for f in self.neighbours if f not in CURVE_FACTORS or f == 1]
        if unknown:
            known = ", ".join(f"{f:g}" for f in CURVE_FACTORS if f != 1)
            raise ValueError(
                f"neighbours: the robustness curve has no radius {unknown[0]:g}; choose from {known}"
            )
        try:
            build_suite(self.suite)
        except UserError as error:
            raise ValueError(f"suite: {error}") from error
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of all values, 64 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the values and the digest, as a decision records them."""
        return {**self.model_dump(mode="json"), "digest": self.digest}


def load_policy(path: Path) -> Policy:
    """Read a policy from a YAML file.

    Raises:
        UserError: the file is unreadable, a key is unknown, or a value is out of range.
    """
    values = read_yaml(path, "policy")
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is not a policy: it must be a map of rules to thresholds")
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_all(error.errors(), str(path), Policy)) from error
