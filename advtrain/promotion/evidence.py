"""Evidence about a version: report, per-sample outcomes, files, run, size and latency."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, SampleResults, load_report
from advtrain.models.network import example_inputs
from advtrain.models.serialized import ModelSource
from advtrain.recipe.data import TextShape
from advtrain.registry import Chain, origin_of, registration
from advtrain.registry.export import (
    FILES_DIGEST_TAG,
    changed_files,
    digested,
    downloaded,
    pickles,
    sample_shape,
    signature_of,
)
from advtrain.registry.facts import text_of
from advtrain.registry.lineage import read_lineage
from advtrain.runs.leaks import Lineage

#: Timed and warm-up passes. The latency is the shortest pass, since other load only adds time.
PASSES, WARM_UP = 31, 5

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """Per test sample (N,): label, clean prediction, correct under attack, attack that broke it."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    robust: Flags
    broken_by: tuple[str | None, ...]  # "clean": misclassified without attack; None: robust
    proven_edits: NDArray[np.int64] | None = None  # number of edits that is proven; None: no edits of texts

    @property
    def clean(self) -> Flags:
        """Flags (N,) of the samples that are correct on the clean input."""
        return np.equal(self.labels, self.predictions)

    def standing(self, attacks: list[str]) -> Flags:
        """Return flags (N,) of the samples that are still robust after the given attacks."""
        return np.array([name is None or name not in ("clean", *attacks) for name in self.broken_by], bool)

    @classmethod
    def read(cls, path: Path) -> Outcomes:
        """Read the outcomes from a samples.parquet file."""
        import pyarrow.parquet as pq

        known = ["label", "clean_prediction", "robust", "broken_by", "proven_edits"]
        names = [name for name in known if name != known[-1] or name in pq.read_schema(path).names]
        return cls._from(pq.read_table(path, columns=names).to_pydict())

    @classmethod
    def of(cls, samples: SampleResults) -> Outcomes:
        """Return the outcomes of an evaluation."""
        return cls._from(samples.columns())

    @classmethod
    def _from(cls, columns: dict[str, Any]) -> Outcomes:
        labels, predictions = (np.array(columns[name], np.int64) for name in ("label", "clean_prediction"))
        proven = np.array(columns["proven_edits"], np.int64) if "proven_edits" in columns else None
        robust = np.array(columns["robust"], bool)
        return cls(labels, predictions, robust, tuple(columns["broken_by"]), proven)


#: Largest share of samples whose result may differ when it is repeated: another machine rounds differently.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Repetition:
    """Comparison of repeated work items with the record."""

    compared: int  # samples
    differing: int  # samples whose recorded result is another
    reason: str = ""  # why nothing could be repeated

    @property
    def agrees(self) -> bool:
        """True if the record is what the model gives, up to rounding."""
        return not self.reason and self.differing <= max(1, TOLERANCE * self.compared)


class ChangedError(UserError):
    """Files of a version were changed after registration; none of them is loaded."""

    def __init__(self, version: Any, changed: list[str]) -> None:
        super().__init__(
            f"version {version.version} of '{version.name}' is not what was registered: {'; '.join(changed)}"
        )


@dataclass(frozen=True)
class Evidence:
    """All inputs of the rules about one version."""

    version: str
    report: AnyReport
    outcomes: Outcomes | None  # None for a regression
    signature: tuple[str, str]  # inputs and outputs, in MLflow's format
    run: dict[str, str]  # status, commit, dirty, data_digest; without unknown values
    files_digest: str
    num_files: int = 0  # unchanged since registration
    pickles: list[str] = field(default_factory=list)
    size_mb: float = 0.0
    latency_ms: float = 0.0
    judged_anew: bool = False
    contradictions: list[str] = field(default_factory=list)  # between report.json and samples.parquet
    repetition: Repetition | None = None  # None: not repeated
    lineage: Lineage = Lineage()

    @property
    def form(self) -> str:
        """Shapes of one input and its outputs, such as `1x8x8 -> 10`."""
        shapes = [sample_shape(side) for side in self.signature]
        return " -> ".join("x".join(map(str, shape)) for shape in shapes)

    def summary(self) -> dict[str, Any]:
        """Return the part of the evidence that a decision records."""
        ancestors = {"ancestors": self.lineage.as_json()["ancestors"]} if self.lineage.ancestors else {}
        return {
            **ancestors,
            "version": self.version,
            "files_digest": self.files_digest,
            "judged_anew": self.judged_anew,
            "data_digest": self.report.data_digest,
            "threat": self.report.threat,
            "figures": self.report.metrics,
        }


def read_evidence(client: Any, version: Any, chain: Chain, *, champion: bool = False) -> Evidence:
    """Collect the evidence about a version from registry and run; measure size and latency.

    Args:
        chain: audit log with the digests and the origin at registration.
        champion: whether a version without digests is accepted.

    Raises:
        ChangedError: a file was changed after registration.
        UserError: the artifacts cannot be downloaded, or there is no readable report.
    """
    with downloaded(client, f"models:/{version.name}/{version.version}", version.run_id) as folder:
        recorded = registration(chain, str(version.version))
        digest = recorded.get("files_digest")
        if changed := changed_files(
            version.tags, folder, recorded=digest, unrecorded=champion and digest is None
        ):
            raise ChangedError(version, changed)
        try:
            report = load_report(folder / "report")
        except UserError as error:
            raise UserError(
                f"version {version.version} of '{version.name}' has no readable report: {error}; "
                "only models that advtrain trained and registered can be compared"
            ) from error
        regression = report.task == "regression"
        model = folder / "model"
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / 1e6
        signature, unsafe = signature_of(model / "MLmodel"), pickles(model)
        return Evidence(
            version=str(version.version),
            report=report,
            outcomes=None if regression else Outcomes.read(folder / "report" / "samples.parquet"),
            signature=signature,
            run=_run_facts(client, version) | recorded.get("origin", {}),
            files_digest=version.tags.get(FILES_DIGEST_TAG, ""),
            num_files=len(digested(folder)),
            pickles=unsafe,
            lineage=read_lineage(folder),
            size_mb=size,
            # Files that could run code are not loaded.
            latency_ms=float("nan") if unsafe else measure_latency(_load(model), _sample(signature, model)),
        )


def measure_latency(model: nn.Module, sample: torch.Tensor) -> float:
    """Return the shortest time of one forward pass of `sample` (1, ...) here, in milliseconds."""
    times = []
    with torch.no_grad():
        for _ in range(WARM_UP + PASSES):
            start = time.perf_counter()
            model(sample)
            times.append(time.perf_counter() - start)
    return 1000 * min(times[WARM_UP:])


def _load(model: Path) -> nn.Module:
    return ModelSource((model / "data" / "model.pt2").read_bytes()).load()


def _sample(signature: tuple[str, str], model: Path) -> torch.Tensor:
    text = text_of(model)
    if text is not None:
        return example_inputs(TextShape(text.max_length, text.vocabulary), 1)
    return torch.zeros(1, *sample_shape(signature[0]))


def _run_facts(client: Any, version: Any) -> dict[str, str]:
    """Return status and origin of the run that made a version; empty if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(version.run_id) if version.run_id else None
    except MlflowException:
        run = None
    if run is None:
        return {}
    status = run.info.status if run.info.lifecycle_stage == "active" else "deleted"
    return {"status": status, **origin_of(run, version)}
