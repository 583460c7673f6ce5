"""evaluate(model, samples) -> Evaluation: suite, masking checks, curve and gallery, in items that may be stored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advtrain.attacks import (
    AttackConfig,
    FailureSearch,
    GradientAttack,
    TransferAttack,
    build_suite,
    check_suite,
)
from advtrain.cluster import default_device
from advtrain.data import Dataset, Split
from advtrain.environment import code_digest, library_versions
from advtrain.errors import UserError
from advtrain.evaluation.cache import ResultCache
from advtrain.evaluation.checks import Check, beats_guessing, training_radius
from advtrain.evaluation.figures import (
    CURVE_FACTORS,
    GALLERY_POOL,
    build_curve,
    curve_rows,
    draw_curve,
    draw_examples,
    error_curve,
    nearest_failures,
    robust_at,
)
from advtrain.evaluation.masking import CHECKS, NUM_SAMPLES
from advtrain.evaluation.model_card import build_card
from advtrain.evaluation.ray_workers import HERE, Workers, build_runner
from advtrain.evaluation.regression import AnyReport, RegressionReport, attack_targets, build_error_report
from advtrain.evaluation.report import Report, Samples, build_report
from advtrain.evaluation.report_html import build_page
from advtrain.evaluation.worst_case import (
    Evaluator,
    Progress,
    Runner,
    SampleResults,
    WorkItem,
    evaluate_samples,
)
from advtrain.models.network import embeds
from advtrain.models.serialized import ModelSource
from advtrain.runs.folder import write_atomically
from advtrain.threat import ThreatModel


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    report: AnyReport
    samples: Samples
    failures: list[dict[str, Any]] = field(default_factory=list)  # the gallery, see figures.nearest_failures
    folder: Path | None = None  # of the cache
    all_known: bool = False  # whether everything came from the cache

    def save(self, folder: Path) -> None:
        """Write samples.parquet, report.html, model_card.md and, last, report.json: one that is there is whole.

        Raises:
            UserError: the folder cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(self.samples.columns()), folder / "samples.parquet")
            write_atomically(folder / "report.html", build_page(self.report, self.failures))
            write_atomically(folder / "model_card.md", build_card(self.report))
            write_atomically(folder / "report.json", self.report.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(f"cannot write the report into '{folder}': {error}") from error


@dataclass(frozen=True)
class EvalSpec:
    """What is evaluated, and how.

    Attributes:
        model: maps (N, ...) float in [0, 1] to logits (N, K), or predictions (N, 1); moved to this process's device,
            else left as it was found.
        split: the samples; `dataset` gives the names and the digest that go into the report.
        suite: a suite by name or as a list (`attacks/suites.py`), or one attack; a regression takes the latter.
        name: what the report calls the model.
        split_name: what the report calls the split; with the data's digest it must say which samples these are.
        batch_size: samples that the model sees at a time; work items have up to four times as many, as long as their
            inputs take no more than 128 MiB (`worst_case.py`). The random starts depend on it.
        extra: further attacks, after the suite's.
        full: whether the masking checks, the curve and the gallery are made too.
        training_threat: the threat model of the training, for the check of its radius; None: not known.
        command: what repeats this, for the report.
        device: where an evaluation in this process runs; None: a GPU if there is one.
    """

    model: nn.Module | ModelSource
    split: Split
    dataset: Dataset
    suite: AttackConfig | str
    threat: ThreatModel
    name: str
    split_name: str = "test"
    seed: int = 0
    batch_size: int = 250
    extra: Sequence[FailureSearch] = ()
    full: bool = False
    training_threat: ThreatModel | None = None
    command: str | None = None
    device: torch.device | None = None

    def build_attacks(self) -> list[FailureSearch]:
        """Return the attacks, the extra ones last.

        Raises:
            UserError: an attack that does not search this threat model's balls, or balls that differ by sample or are
                around tokens: a report names one norm and one eps.
        """
        threat = self.threat
        if threat.radius_scale is not None or threat.free is not None or threat.group != "sample":
            raise UserError(
                "a report is about one ball for every sample: evaluate takes no radius_scale, free or group 'token'"
            )
        suite = build_suite(self.suite) if isinstance(self.suite, str) else [GradientAttack(self.suite)]
        attacks = [*suite, *self.extra]
        check_suite(attacks, self.threat)  # before any of them has taken its time
        return attacks

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the conditions."""
        return {
            "model": self.name,
            "model_digest": self.model.digest if isinstance(self.model, ModelSource) else None,
            "data": self.dataset.name,
            "data_digest": self.dataset.digest,
            "split": self.split_name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "seed": self.seed,
            "command": self.command,
            "versions": library_versions(),
        }


@dataclass(frozen=True)
class _EvaluatorFactory:
    """Builds the evaluator in whichever process it works."""

    model: nn.Module | ModelSource
    split: Split
    attacks: Sequence[FailureSearch]
    threat: ThreatModel
    seed: int
    batch_size: int

    def __call__(self, device: torch.device) -> Evaluator:
        """Load the model on `device` and return its evaluator."""
        model = self.model.load() if isinstance(self.model, ModelSource) else self.model
        probes = {**CHECKS, "curve": robust_at, "gallery": nearest_failures}
        rest = (self.split, self.attacks, self.threat, self.seed, self.batch_size)
        return Evaluator(model.to(device), *rest, device, probes)


def evaluate(
    spec: EvalSpec,
    *,
    workers: Workers = HERE,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack every sample of the split with every attack and report what is still robust.

    Args:
        spec: what is evaluated, and how.
        workers: where the work is done; the result does not depend on their number.
        cache: folder below which finished work items are kept, so that nothing is done twice; needs a ModelSource.
        progress: called after each work item.

    Raises:
        UserError: a suite for a regression, an attack that does not fit the threat model, a cache in use.
    """
    if len(spec.split) == 0:
        raise UserError(f"there are no {spec.split_name} samples to evaluate '{spec.name}' on")
    if spec.dataset.regression:
        return _evaluate_regression(spec)
    attacks = spec.build_attacks()
    factory = _EvaluatorFactory(spec.model, spec.split, attacks, spec.threat, spec.seed, spec.batch_size)
    kept = None if cache is None else _open_cache(cache, spec, attacks, workers)
    run = build_runner(factory, workers, spec.device)
    with nullcontext() if kept is None else kept.opened():
        return _evaluate_classifier(run, spec, attacks, kept, progress)


def _evaluate_classifier(
    run: Runner,
    spec: EvalSpec,
    attacks: Sequence[FailureSearch],
    kept: ResultCache | None,
    progress: Progress | None,
) -> Evaluation:
    run = run if kept is None else kept.through(run)
    facts = spec.facts() | {"suite": spec.suite if isinstance(spec.suite, str) else attacks[0].name}
    samples = evaluate_samples(run, spec.split, attacks, spec.batch_size, progress)
    probes = _run_probes(run, samples, spec, progress) if spec.full else {}
    names = spec.dataset.class_names
    checks = [Check.model_validate(probes[name]) for name in CHECKS if probes.get(name)]
    if checks:
        checks += [training_radius(spec.training_threat, spec.threat), beats_guessing(samples, names)]
    if spec.full:
        flags = [probes[f"curve {factor}"]["standing"] for factor in CURVE_FACTORS]
        facts["curve"] = build_curve(flags, spec.threat)
    report = build_report(samples, names, checks=checks, **facts)
    failures = probes.get("gallery", {}).get("failures", [])
    folder, all_known = (None, False) if kept is None else (kept.path, kept.all_known)
    return Evaluation(report, samples, failures, folder, all_known)


def _evaluate_regression(spec: EvalSpec) -> Evaluation:
    """Masking checks are of classifiers; two directions and restarts stand in for the suite."""
    if isinstance(spec.suite, str):
        raise UserError("suites are for classifiers; a regression is judged by evaluation.attack")
    device, facts = spec.device or default_device(), spec.facts()
    network = (spec.model.load() if isinstance(spec.model, ModelSource) else spec.model).to(device)
    how: dict[str, Any] = {"seed": spec.seed, "batch_size": spec.batch_size, "device": device}
    errors = attack_targets(network, spec.split, GradientAttack(spec.suite), spec.threat, **how)
    if spec.full:
        facts["curve"] = error_curve(network, spec.split, spec.threat, **how)
    return Evaluation(build_error_report(errors, **facts), errors)


def _open_cache(
    cache: Path, spec: EvalSpec, attacks: Sequence[FailureSearch], workers: Workers
) -> ResultCache:
    """Return the cache of this evaluation: named by all that shapes a work item's result."""
    if not isinstance(spec.model, ModelSource):
        raise TypeError("a cached evaluation needs a ModelSource, whose digest names its model")
    facts = spec.facts()
    shaping = ("model_digest", "data", "split", "data_digest", "norm", "eps", "seed")
    key = {name: facts[name] for name in shaping} | {
        "versions": {name: facts["versions"][name] for name in ("torch", "torchvision", "numpy")},
        "code": code_digest(),
        "attack": None if isinstance(spec.suite, str) else spec.suite.model_dump(mode="json"),
        "attacks": [attack.name for attack in attacks],
        "batch_size": spec.batch_size,
        "transfer": [a.source.digest for a in attacks if isinstance(a, TransferAttack)],
        "device": (spec.device or default_device()).type,
        # Rounding may differ with the number of threads; a worker has one.
        "threads": 1 if workers.number != 0 else torch.get_num_threads(),
    }
    return ResultCache(cache, f"{facts['data']}-{spec.threat.norm}-{spec.threat.eps:.4g}", key)


def _run_probes(
    run: Runner, samples: SampleResults, spec: EvalSpec, progress: Progress | None
) -> dict[str, Any]:
    """Run the masking checks, the curve and the gallery; return the result of each by name."""
    curve, shape = curve_rows(spec.split, spec.seed), spec.dataset.shape
    items = [WorkItem(curve, probe=f"curve {factor}") for factor in CURVE_FACTORS]
    right = np.flatnonzero(samples.clean)
    if len(right):
        rows = _spread(right, NUM_SAMPLES)
        standing = np.intersect1d(rows, np.flatnonzero(samples.robust))
        items = [WorkItem(rows, probe=name, standing=standing) for name in CHECKS] + items
    fallen = np.flatnonzero(samples.clean & ~samples.robust)
    if len(fallen) and len(shape) == 3 and shape[0] in (1, 3):
        items.append(WorkItem(_spread(fallen, GALLERY_POOL), probe="gallery"))
    found = {}
    for done, (item, result) in enumerate(run(items), start=1):
        found[item.key] = result
        if progress is not None:
            progress("checks", done, len(items))
    return found


def _spread(rows: Any, number: int) -> Any:
    """Return at most `number` of the rows, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(np.int64))]


def load_report(folder: Path) -> AnyReport:
    """Read report.json, of a classifier or of a regression."""
    try:
        return Report.load(folder)
    except UserError:
        return RegressionReport.load(folder)


def draw_figures(
    model: nn.Module, dataset: Dataset, report: AnyReport, threat: ThreatModel, folder: Path, *, seed: int
) -> None:
    """Write robustness_curve.png and, where images with classes are perturbed, examples.png, from PGD-20 on test
    samples."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(report.curve, threat, folder / "robustness_curve.png", accuracy=not dataset.regression)
    if dataset.regression or len(dataset.shape) != 3 or embeds(model):
        return
    device = default_device()
    draw_examples(
        model.to(device),
        dataset.test,
        GradientAttack(AttackConfig.model_validate({"num_steps": 20})),
        threat,
        dataset.class_names,
        seed=seed,
        device=device,
        path=folder / "examples.png",
    )
