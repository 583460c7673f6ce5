"""The report on one model: figures with their intervals, and per-sample outcomes; JSON and parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from advtrain.evaluation.suite import SampleResults
from advtrain.lookup import UserError
from advtrain.runfolder import write_atomically
from advtrain.threat import ThreatModel


class Share(BaseModel):
    """A share of samples, with its 95 % Wilson score interval."""

    model_config = ConfigDict(frozen=True)
    value: float
    low: float
    high: float
    count: int
    total: int

    @classmethod
    def of(cls, flags: Any) -> Share:
        """Return the share of true flags, (N,) bool."""
        count, total = int(np.sum(flags)), len(flags)
        low, high = wilson(count, total)
        return cls(value=count / total if total else 0.0, low=low, high=high, count=count, total=total)

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} %  [{100 * self.low:.2f}, {100 * self.high:.2f}]"


class AttackFigure(BaseModel):
    """One attack of the suite; `robust` is what still stood after it."""

    model_config = ConfigDict(frozen=True)
    name: str
    robust: Share
    num_attacked: int
    num_broken: int
    seconds: float


class ClassFigure(BaseModel):
    """Accuracies on the samples of one class."""

    model_config = ConfigDict(frozen=True)
    label: int
    name: str
    clean: Share
    robust: Share


class ReportBase(BaseModel):
    """What every report says: which model, on which data, under which threat model, with what."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    schema_version: int = 1
    model: str
    norm: str
    eps: float
    data: str
    split: str
    data_digest: str
    seed: int
    versions: dict[str, str]

    @property
    def threat(self) -> str:
        """The threat model as `linf:8/255`."""
        return str(ThreatModel(self.norm, self.eps))  # type: ignore[arg-type]

    def save(self, folder: Path, samples: Samples) -> None:
        """Write report.json and samples.parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(samples.columns()), folder / "samples.parquet")
            write_atomically(folder / "report.json", self.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(f"cannot write the report into '{folder}': {error}") from error

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read report.json."""
        try:
            return cls.model_validate(json.loads((folder / "report.json").read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"no readable report in '{folder}': {error}") from error


class Samples(Protocol):
    """Per-sample outcomes."""

    def columns(self) -> dict[str, Any]:
        """Return what samples.parquet holds."""
        ...


class Report(ReportBase):
    """The evaluation of one classifier on one split under one threat model."""

    task: Literal["classification"] = "classification"
    clean_accuracy: float
    robust_accuracy: float
    clean: Share
    robust: Share
    attacks: list[AttackFigure]
    per_class: list[ClassFigure]

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that MLflow shows of the test split."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_accuracy_low": self.robust.low,
            "robust_accuracy_high": self.robust.high,
        }

    @property
    def tags(self) -> dict[str, str]:
        """What the registry says of the model."""
        return {
            "clean_accuracy": f"{self.clean_accuracy:.6f}",
            "robust_accuracy": f"{self.robust_accuracy:.6f}",
            "robust_interval": f"[{self.robust.low:.6f}, {self.robust.high:.6f}]",
            "attacks": ", ".join(attack.name for attack in self.attacks),
        }

    @property
    def title(self) -> str:
        """One line over the table."""
        return f"{self.model}: {self.robust.total:,} {self.split} samples of {self.data}, {self.threat}"

    @property
    def rows(self) -> list[list[str]]:
        """The table: names and figures with intervals."""
        rows = [["clean accuracy", str(self.clean)]]
        return rows + [[f"robust accuracy, {attack.name}", str(attack.robust)] for attack in self.attacks]


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `count` out of `total`; (0, 1) for no samples."""
    from scipy.stats import binomtest

    if total == 0:
        return 0.0, 1.0
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def build_report(samples: SampleResults, class_names: list[str] | None, **facts: Any) -> Report:
    """Summarise per-sample results; `facts` are the fields of ReportBase."""
    clean, robust = Share.of(samples.clean), Share.of(samples.robust)
    classes = [int(label) for label in np.unique(samples.labels)]
    return Report(
        **facts,
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
                seconds=round(record.seconds, 3),
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
