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
    TransferAttack,
    build_attack,
    build_suite,
    check_suite,
)
from advtrain.cluster import default_device
from advtrain.data import Dataset, Split
from advtrain.environment import code_digest, library_versions
from advtrain.errors import UserError
from advtrain.evaluation.cache import Store
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
from advtrain.evaluation.masking import CHECKS, NUM_SAMPLES, Check, beats_guessing, training_radius
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
from advtrain.models.serialized import ModelSource
from advtrain.runs.folder import write_atomically
from advtrain.threat import ThreatModel


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    report: AnyReport
    samples: Samples
    failures: list[dict[str, Any]] = field(default_factory=list)  # the gallery, see pictures.nearest_failures
    folder: Path | None = None  # of the store
    all_known: bool = False  # whether everything came from the store

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
    """What is evaluated and how; called with a device, it builds the evaluator there."""

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
    model: nn.Module | ModelSource,
    split: Split,
    dataset: Dataset,
    judged_with: AttackConfig | str,
    threat: ThreatModel,
    *,
    name: str,
    split_name: str = "test",
    seed: int = 0,
    batch_size: int = 250,
    extra: Sequence[FailureSearch] = (),
    full: bool = False,
    trained: ThreatModel | None = None,
    command: str | None = None,
    workers: Workers = HERE,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluator `model` on `split`.

    Args:
        model: maps (N, ...) float in [0, 1] to logits (N, K), or predictions (N, 1); moved to this
            process's device, else left as it was found.
        split: the samples; `dataset` gives the names and the digest that go into the report.
        judged_with: a suite by name or as a list (`attacks/suites.py`), or one attack; a regression takes the latter.
        name: what the report calls the model.
        split_name: what the report calls the split; with the data's digest it must say which samples these are.
        batch_size: samples that the model sees at a time; items of work have up to four times as many, as long as
            their inputs take no more than 128 MiB (`suite.py`). The random starts depend on it.
        extra: further attacks, after the suite's.
        full: whether the masking checks, the curve and the gallery are made too.
        trained: the threat model of the training, for the check of its radius; None: not known.
        command: what repeats this, for the report.
        workers: where the work is done; the result does not depend on their number.
        store: folder below which finished items are kept, so that nothing is done twice; needs a ModelSource.
        progress: called after each item.

    Raises:
        UserError: a suite for a regression, an attack that does not fit the threat model, a store in use.
    """
    if len(split) == 0:
        raise UserError(f"there are no {split_name} samples to evaluate '{name}' on")
    facts = _facts(model, dataset, threat)
    facts |= {"model": name, "split": split_name, "seed": seed, "command": command}
    if dataset.regression:
        return _evaluate_regression(model, split, judged_with, threat, facts, batch_size, full)
    attacks = build_suite(judged_with) if isinstance(judged_with, str) else [build_attack(judged_with)]
    attacks = [*attacks, *extra]
    check_suite(attacks, threat)  # before any of them has taken its time
    facts["suite"] = judged_with if isinstance(judged_with, str) else attacks[0].name
    case = EvalSpec(model, split, attacks, threat, seed, batch_size)
    kept = None if store is None else _open_store(store, case, judged_with, facts, workers)
    run = build_runner(case, workers)
    with nullcontext() if kept is None else kept.opened():
        return _evaluate_classifier(run, case, dataset, facts, kept, full, trained, progress)


def _facts(model: nn.Module | ModelSource, dataset: Dataset, threat: ThreatModel) -> dict[str, Any]:
    """Return what the report says of the conditions."""
    return {
        "model_digest": model.digest if isinstance(model, ModelSource) else None,
        "data": dataset.name,
        "data_digest": dataset.digest,
        "norm": threat.norm,
        "eps": threat.eps,
        "versions": library_versions(),
    }


def _evaluate_classifier(
    run: Runner,
    case: EvalSpec,
    dataset: Dataset,
    facts: dict[str, Any],
    kept: Store | None,
    full: bool,
    trained: ThreatModel | None,
    progress: Progress | None,
) -> Evaluation:
    run = run if kept is None else kept.through(run)
    samples = evaluate_samples(run, case.split, case.attacks, case.batch_size, progress)
    probes = _run_probes(run, samples, case, dataset.shape, progress) if full else {}
    checks = [Check.model_validate(probes[name]) for name in CHECKS if name in probes]
    if checks:
        checks += [training_radius(trained, case.threat), beats_guessing(samples, dataset.class_names)]
    if full:
        flags = [probes[f"curve {factor}"]["standing"] for factor in CURVE_FACTORS]
        facts = {**facts, "curve": build_curve(flags, case.threat)}
    report = build_report(samples, dataset.class_names, checks=checks, **facts)
    failures = probes.get("gallery", {}).get("failures", [])
    folder, all_known = (None, False) if kept is None else (kept.path, kept.all_known)
    return Evaluation(report, samples, failures, folder, all_known)


def _evaluate_regression(
    model: nn.Module | ModelSource,
    split: Split,
    judged_with: AttackConfig | str,
    threat: ThreatModel,
    facts: dict[str, Any],
    batch_size: int,
    full: bool,
) -> Evaluation:
    """Masking checks are of classifiers; two directions and restarts stand in for the suite."""
    if isinstance(judged_with, str):
        raise UserError("suites are for classifiers; a regression is judged by evaluation.attack")
    device, seed = default_device(), facts["seed"]
    network = (model.load() if isinstance(model, ModelSource) else model).to(device)
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
    errors = attack_targets(network, split, build_attack(judged_with), threat, **how)
    if full:
        facts = {**facts, "curve": error_curve(network, split, threat, **how)}
    return Evaluation(build_error_report(errors, **facts), errors)


def _open_store(
    store: Path, case: EvalSpec, judged_with: AttackConfig | str, facts: dict[str, Any], workers: Workers
) -> Store:
    """Return the store of this evaluation: named by all that shapes an item's result."""
    if not isinstance(case.model, ModelSource):
        raise TypeError("a stored evaluation needs a ModelSource, whose digest names its model")
    shaping = ("model_digest", "data", "split", "data_digest", "norm", "eps", "seed")
    key = {name: facts[name] for name in shaping} | {
        "versions": {name: facts["versions"][name] for name in ("torch", "torchvision", "numpy")},
        "code": code_digest(),
        "attack": None if isinstance(judged_with, str) else judged_with.model_dump(mode="json"),
        "attacks": [attack.name for attack in case.attacks],
        "batch_size": case.batch_size,
        "transfer": [a.source.digest for a in case.attacks if isinstance(a, TransferAttack)],
        "device": default_device().type,
        # Rounding may differ with the number of threads; a worker has one.
        "threads": 1 if workers.number != 0 else torch.get_num_threads(),
    }
    return Store(store, f"{facts['data']}-{case.threat.norm}-{case.threat.eps:.4g}", key)


def _run_probes(
    run: Runner, samples: SampleResults, case: EvalSpec, shape: tuple[int, ...], progress: Progress | None
) -> dict[str, Any]:
    """Do the masking checks, the curve and the gallery; return what each gave."""
    curve = curve_rows(case.split, case.seed)
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
    """Write robustness_curve.png and, of images with classes, examples.png, from PGD-20 on test samples."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(report.curve, threat, folder / "robustness_curve.png", accuracy=not dataset.regression)
    if dataset.regression or len(dataset.shape) != 3:
        return
    device = default_device()
    draw_examples(
        model.to(device),
        dataset.test,
        build_attack(AttackConfig.model_validate({"num_steps": 20})),
        threat,
        dataset.class_names,
        seed=seed,
        device=device,
        path=folder / "examples.png",
    )
