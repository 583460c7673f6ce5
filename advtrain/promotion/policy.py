"""The policy: what a challenger must show, as one YAML file with a version; its digest stands in every decision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from advtrain.attacks import build_suite
from advtrain.errors import UserError, nearest
from advtrain.evaluation import CURVE_FACTORS
from advtrain.schema import Config, Number, read_yaml


class Policy(Config):
    """Thresholds of the gate. Accuracies are shares in [0, 1]; null switches a rule off."""

    name: str
    """what decisions call it"""
    version: int = Field(ge=1)
    """raised with every change"""
    description: str = ""
    """what it is for"""
    suite: str = "autoattack"
    """attacks that the challenger's report must have, with these budgets at least"""
    min_samples: int = Field(default=300, ge=1)
    """evaluated test samples"""
    alpha: Number = Field(default=0.05, gt=0, lt=0.5)
    """level of the paired tests, each one-sided"""
    min_gain: Number | None = Field(default=0.0, gt=-1, lt=1)
    """robust accuracy must surely be better than the champion's by more than this; 0: surely better; below 0: surely
    not worse by more than that; null: it is enough not to be surely worse"""
    max_clean_drop: Number | None = Field(default=0.01, ge=0, le=1)
    """clean accuracy may be so much below the champion's"""
    min_worst_class: Number | None = Field(default=0.01, ge=0, le=1)
    """robust accuracy of the worst class"""
    neighbours: list[Number] = Field(default=[0.75, 1.25], min_length=1)
    """radii in multiples of the judge's, of the report's curve, at which robustness must not collapse"""
    min_neighbour_share: Number | None = Field(default=0.5, ge=0, le=1)
    """share of the accuracy at the judge's radius that must be left at a neighbour, unless the champion has no more"""
    max_calibration_error: Number | None = Field(default=None, ge=0, le=1)
    """expected calibration error of the clean predictions"""
    max_latency_ms: Number | None = Field(default=None, gt=0)
    """time for one sample, the shortest of some passes that the gate measures on its own machine"""
    max_size_mb: Number | None = Field(default=None, gt=0)
    """of all files of the model, in 10^6 bytes"""
    approve_signature_change: bool = False
    """whether inputs and outputs may differ from the champion's"""
    clean_git: bool = True
    """whether the run must come from a commit with nothing uncommitted"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = [f for f in self.neighbours if f not in CURVE_FACTORS or f == 1]
        if unknown:
            known = ", ".join(f"{f:g}" for f in CURVE_FACTORS if f != 1)
            raise ValueError(
                f"neighbours: the reports' curves have no radius {unknown[0]:g}; they have {known}"
            )
        try:
            build_suite(self.suite)
        except UserError as error:
            raise ValueError(f"suite: {error}") from error
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over all values, 64 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return what a decision says of it: all values, and the digest."""
        return {**self.model_dump(mode="json"), "digest": self.digest}


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        UserError: unreadable, an unknown key, or a value out of its range; the message names the path.
    """
    values = read_yaml(path, "policy")
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is no policy: it must be a map of rules to thresholds")
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"'{path}': unknown rule '{where}'{nearest(where, Policy.model_fields)}"
            ) from error
        raise UserError(f"'{path}': {where + ': ' if where else ''}{first['msg']}") from error
