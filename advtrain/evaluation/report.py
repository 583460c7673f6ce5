"""Report on one model: metrics with confidence intervals, attack results and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from advtrain.data.units import FeatureUnits, unit_table
from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.evaluation.checks import Check
from advtrain.evaluation.edit_figures import EditFigures
from advtrain.evaluation.statistics import Share, calibration_error
from advtrain.evaluation.texts import TextFacts
from advtrain.evaluation.worst_case import SampleResults
from advtrain.threat import ThreatModel

#: What a robust accuracy in embeddings says, for the reader of a report.
EMBEDDING_CAVEAT = (
    "The attacks change embeddings, within a ball around each one. Such a ball is a regularizer and no threat model "
    "of inputs: its points need not be embeddings of any input. A model with this report is not promoted."
)


class AttackFigure(BaseModel):
    """One attack of the suite; `robust` is the share of samples still robust after it."""

    model_config = ConfigDict(frozen=True)
    name: str
    robust: Share
    num_attacked: int
    num_broken: int


class ClassFigure(BaseModel):
    """Accuracies on the samples of one class."""

    model_config = ConfigDict(frozen=True)
    label: int
    name: str
    clean: Share
    robust: Share

    @property
    def full_name(self) -> str:
        """Label and name, such as `3 (cat)`; the label alone if the data has no names."""
        return self.name if self.name == str(self.label) else f"{self.label} ({self.name})"


class CurvePoint(BaseModel):
    """Accuracy, or worst-case MAE of a regression, at one radius, with its 95 % interval."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    eps: float
    value: float
    low: float
    high: float


class ReportBase(BaseModel):
    """Fields of every report: model, data, threat model, versions and curve."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    schema_version: int = 3
    model: str
    norm: str
    eps: float
    data: str
    split: str
    data_digest: str
    seed: int
    versions: dict[str, str]
    model_digest: str | None = None
    """SHA-256 over weights and architecture"""
    command: str | None = None
    """command that repeats this evaluation"""
    file: str | None = Field(default=None, exclude_if=lambda file: file is None)
    """name of the file or folder of the data; missing for a built-in data set"""
    features: list[FeatureUnits] = Field(default=[], exclude_if=lambda features: not features)
    """columns of a table and the ranges that are scaled to [0, 1]; missing for other data"""
    training_copies: int | None = Field(default=None, exclude_if=lambda copies: copies is None)
    """number of samples that equal a training sample of the model; missing unless other data was searched for them"""
    space: Literal["input", "embedding"] = Field(default="input", exclude_if=lambda space: space == "input")
    """what the attacks change: the input, or the word embeddings of a text; missing for the input"""
    text: TextFacts | None = Field(default=None, exclude_if=lambda text: text is None)
    """tokenizer, and what it leaves out of the evaluated texts; missing for other data"""
    curve: list[CurvePoint] = []
    """accuracy or MAE under PGD-20 at several radii, on a stratified subset of the samples; or the accuracy of all
    texts within 0, 1, ... edits"""

    @property
    def threat(self) -> str:
        """Threat model as text, such as `linf:8/255` or `words:2`."""
        if self.is_edited:
            return f"{self.norm}:{self.eps:g}"
        return str(ThreatModel(self.norm, self.eps))  # type: ignore[arg-type]

    @property
    def is_edited(self) -> bool:
        """True if the threat model is edits of texts, and eps their largest number."""
        return self.norm in ("words", "chars")

    @property
    def radius_word(self) -> str:
        """Word for the radius: epsilon, or edits."""
        return "edits" if self.is_edited else "epsilon"

    @property
    def radius_name(self) -> str:
        """Name of the radius with the norm, for the axis of a curve."""
        return f"{self.radius_word} ({self.norm})"

    @property
    def curve_attack(self) -> str:
        """Attack and samples of the curve."""
        return "Search of edits, all samples" if self.is_edited else "PGD-20 on a stratified subset"

    @property
    def data_title(self) -> str:
        """Name of the data for readers: the file or folder, or the built-in data set."""
        return self.file or self.data

    @property
    def data_facts(self) -> dict[str, str]:
        """Facts of the evaluated samples: copies of training samples, if known, and tokenizer."""
        known = self.training_copies is not None
        copies = {"copies of training samples": f"{self.training_copies:,}"} if known else {}
        return copies | ({} if self.text is None else self.text.rows())

    @property
    def caveat(self) -> str:
        """Sentence on attacks in embeddings; "" for attacks on the input."""
        return EMBEDDING_CAVEAT if self.space == "embedding" else ""

    def units(self, most: int = 40) -> tuple[list[str], list[list[str]]]:
        """Return head and rows of a table with the radius in the units of at most `most` features."""
        return unit_table(self.features, {self.threat: self.eps}, most)

    def which(self, total: int) -> str:
        """Return the samples as text: `10,000 test samples` or `first 60 test samples`."""
        counted = any(letter.isdigit() for letter in self.split)
        return f"{self.split} samples" if counted else f"{total:,} {self.split} samples"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read report.json."""
        try:
            return cls.model_validate(read_record(folder / "report.json"))
        except (OSError, ValueError) as error:
            raise UserError(f"no readable report in '{folder}': {error}") from error


class Samples(Protocol):
    """Per-sample results."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of samples.parquet."""
        ...


class Report(ReportBase):
    """The evaluation of one classifier on one split under one threat model."""

    task: Literal["classification"] = "classification"
    clean_accuracy: float
    robust_accuracy: float
    clean: Share
    robust: Share
    suite: str
    attacks: list[AttackFigure]
    per_class: list[ClassFigure]
    calibration_error: float | None = None
    """expected calibration error of the clean predictions, 15 bins (Guo et al. 2017)"""
    checks: list[Check] = []
    edits: EditFigures | None = Field(default=None, exclude_if=lambda edits: edits is None)
    """search of edits of texts; missing for attacks on tensors"""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def trust(self) -> Literal["trusted", "broken", "unchecked"]:
        """Trust in the robust accuracy: `broken` if a check failed, `unchecked` without checks."""
        if not self.checks:
            return "unchecked"
        return "broken" if any(check.verdict == "failed" for check in self.checks) else "trusted"

    @property
    def calibration(self) -> str:
        """Calibration error as a sentence."""
        if self.calibration_error is None:
            return "The calibration was not measured."
        return f"Expected calibration error of the clean predictions: {self.calibration_error:.3f} (15 bins)."

    @property
    def worst_class(self) -> ClassFigure | None:
        """Class with the lowest robust accuracy; None for fewer than two classes."""
        several = len(self.per_class) > 1
        return min(self.per_class, key=lambda figure: figure.robust.value) if several else None

    def is_weak(self, figure: ClassFigure) -> bool:
        """Return whether a class's interval lies below the robust accuracy of all samples."""
        return figure.robust.high < self.robust.value

    @property
    def weak_rule(self) -> str:
        """The rule of `is_weak` as a sentence."""
        overall = f"{100 * self.robust.value:.1f} %"
        return (
            f"A class is weak if its 95 % interval lies below the robust accuracy of all samples ({overall})."
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the test split for MLflow."""
        proven = {} if self.edits is None else {"proven_accuracy": self.edits.proven.value}
        return proven | {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_accuracy_low": self.robust.low,
            "robust_accuracy_high": self.robust.high,
        }

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the model in the registry."""
        return {
            "clean_accuracy": f"{self.clean_accuracy:.6f}",
            "robust_accuracy": f"{self.robust_accuracy:.6f}",
            "robust_interval": f"[{self.robust.low:.6f}, {self.robust.high:.6f}]",
            "suite": self.suite,
            "attacks": ", ".join(attack.name for attack in self.attacks),
            "trust": self.trust,
        }

    @property
    def title(self) -> str:
        """Title of the table, one line."""
        return f"{self.model}: {self.which(self.robust.total)} of {self.data_title}, {self.threat}"

    @property
    def rows(self) -> list[list[str]]:
        """Rows of the table: names, and values with intervals."""
        rows = [["clean accuracy", str(self.clean)]]
        rows += [[f"robust accuracy, {attack.name}", str(attack.robust)] for attack in self.attacks]
        if self.edits is not None:
            rows += self.edits.rows
        if worst := self.worst_class:
            rows.append([f"robust accuracy, worst class ({worst.name})", str(worst.robust)])
        failed = [check.name for check in self.checks if check.verdict == "failed"]
        return rows if not self.checks else [*rows, ["trust", ", ".join([self.trust, *failed])]]


def build_report(samples: SampleResults, class_names: list[str] | None, **facts: Any) -> Report:
    """Build the report from per-sample results; `facts` are the fields of ReportBase."""
    clean, robust = Share.of(samples.clean), Share.of(samples.robust)
    classes = [int(label) for label in np.unique(samples.labels)]
    confidence = samples.clean_confidences
    return Report(
        **facts,
        calibration_error=None if confidence is None else calibration_error(confidence, samples.clean),
        clean_accuracy=clean.value,
        robust_accuracy=robust.value,
        clean=clean,
        robust=robust,
        attacks=[
            AttackFigure(
                name=record.name,
                robust=Share.of(np.arange(len(samples.labels)) < record.num_standing),
                num_attacked=record.num_attacked,
                num_broken=record.num_broken,
            )
            for record in samples.attacks
        ],
        per_class=[
            ClassFigure(
                label=label,
                name=class_names[label] if class_names else str(label),
                clean=Share.of(samples.clean[samples.labels == label]),
                robust=Share.of(samples.robust[samples.labels == label]),
            )
            for label in classes
        ],
    )
