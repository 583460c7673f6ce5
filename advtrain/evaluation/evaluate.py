"""Evaluation of one model: attack suite, masking checks, accuracy curve and gallery.

The work is split into work items (`worst_case.py`), whose results may be cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advtrain.attacks import (
    AttackConfig,
    FailureSearch,
    GradientAttack,
    TransferAttack,
)
from advtrain.cluster import default_device
from advtrain.data import ArraySplit, Dataset, Split, digest_of
from advtrain.data.texts import tokenizer_digest
from advtrain.environment import code_digest, library_versions
from advtrain.errors import UserError
from advtrain.evaluation.cache import ResultCache
from advtrain.evaluation.checks import Check, beats_guessing, square_record, training_radius
from advtrain.evaluation.edit_checks import TEXT_CHECKS, run_text_checks
from advtrain.evaluation.edit_figures import EditFigures, edit_facts
from advtrain.evaluation.edit_report import edit_curve, shortest_edits
from advtrain.evaluation.edits import EditFactory, attack_name, evaluate_texts, training_texts
from advtrain.evaluation.figures import (
    CURVE_FACTORS,
    build_curve,
    draw_curve,
    draw_examples,
    error_curve,
)
from advtrain.evaluation.masking import CHECKS
from advtrain.evaluation.model_card import build_card
from advtrain.evaluation.probes import PROBES, run_probes
from advtrain.evaluation.ray_workers import HERE, Workers, build_runner
from advtrain.evaluation.regression import AnyReport, RegressionReport, attack_targets, build_error_report
from advtrain.evaluation.report import Report, Samples, build_report
from advtrain.evaluation.report_html import build_page
from advtrain.evaluation.spec import EvalSpec
from advtrain.evaluation.texts import card_rows, text_failures
from advtrain.evaluation.worst_case import (
    Evaluator,
    Progress,
    Runner,
    evaluate_samples,
)
from advtrain.models.network import embeds
from advtrain.models.serialized import ModelSource, copied
from advtrain.recipe.edits import EditThreatConfig
from advtrain.runs.folder import write_atomically
from advtrain.runs.lineage import Ancestor
from advtrain.threat import ThreatModel


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation."""

    report: AnyReport
    samples: Samples
    failures: list[dict[str, Any]] = field(default_factory=list)  # see nearest_failures and text_failures
    folder: Path | None = None  # cache folder
    all_known: bool = False  # all results came from the cache
    class_names: list[str] | None = None  # names of all classes; None: a regression, or classes without names

    def save(
        self, folder: Path, about: Mapping[str, str] | None = None, ancestors: Sequence[Ancestor] = ()
    ) -> None:
        """Write samples.parquet, report.html, model_card.md and report.json.

        report.json is written last: if it exists, the report is complete.

        Args:
            folder: folder of the report; it is created.
            about: facts such as date, recipe and time for the page and the card. They are not in report.json, which a
                repeated evaluation writes unchanged.
            ancestors: ancestors of the model, for the card.

        Raises:
            UserError: the folder cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = card_rows(self.failures, dict(enumerate(self.class_names or ())))
        page = build_page(self.report, self.failures, self.samples, self.class_names, about or {})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(self.samples.columns()), folder / "samples.parquet")
            write_atomically(folder / "report.html", page)
            write_atomically(folder / "model_card.md", build_card(self.report, about or {}, ancestors, texts))
            write_atomically(folder / "report.json", self.report.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(f"cannot write the report into '{folder}': {error}") from error


@dataclass(frozen=True)
class _EvaluatorFactory:
    """Factory that a worker process calls to load the model and build its evaluator."""

    model: nn.Module | ModelSource
    split: Split
    attacks: Sequence[FailureSearch]
    threat: ThreatModel
    seed: int
    batch_size: int
    num_classes: int
    full: bool
    other: Split | None

    def share_memory_of(self, equal: _EvaluatorFactory) -> None:
        """Replace the samples in memory by those of an equal factory."""
        for mine, other in ((self.split, equal.split), (self.other, equal.other)):
            if isinstance(mine, ArraySplit) and isinstance(other, ArraySplit):
                mine.share_memory_of(other)

    def __call__(self, device: torch.device) -> Evaluator:
        """Load the model on `device` and return its evaluator."""
        model = self.model.load() if isinstance(self.model, ModelSource) else self.model
        rest = (self.split, self.attacks, self.threat, self.seed, self.batch_size)
        # A module is copied before its first query; a ModelSource loads a fresh model at any time.
        untouched = copied(self.model) if self.full and isinstance(self.model, nn.Module) else self.model

        def fresh() -> nn.Module | None:
            again = copied(untouched)
            return None if again is None else again.to(device)

        return Evaluator(model.to(device), *rest, device, dict(PROBES), self.num_classes, fresh, self.other)


def evaluate(
    spec: EvalSpec,
    *,
    workers: Workers = HERE,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack every sample of the split with every attack and return the report.

    Args:
        spec: model, samples, attacks and threat model.
        workers: where the work items run. The result does not depend on the number of workers.
        cache: parent folder of the caches; finished work items do not run again. It requires a ModelSource.
        progress: called after each work item.

    Raises:
        UserError: no samples, inputs outside the bounds, outputs that are not logits of the data's classes, edits or a
            suite for a regression, an attack that does not support the threat model, or a cache that another process
            uses.
    """
    if len(spec.split) == 0:
        raise UserError(f"there are no {spec.split_name} samples to evaluate '{spec.name}' on")
    if spec.dataset.regression:
        return _evaluate_regression(spec)
    if spec.edits is not None:
        return _evaluate_edits(spec, spec.edits, workers, cache, progress)
    if spec.dataset.text is not None and isinstance(spec.model, ModelSource):
        spec.model.require_embeddings(spec.name)
    attacks = spec.build_attacks()
    how = (spec.ball, spec.seed, spec.batch_size, spec.dataset.num_classes, spec.full, spec.other)
    factory = _EvaluatorFactory(spec.model, spec.split, attacks, *how)
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
    probes = run_probes(run, samples, spec.split, spec.seed, progress) if spec.full else {}
    names = spec.dataset.class_names
    checks = [Check.model_validate(probes[name]) for name in CHECKS if probes.get(name)]
    if checks:
        checks += [square_record(samples), training_radius(spec.training_threat, spec.ball)]
        checks.append(beats_guessing(samples, names))
    if spec.full:
        flags = [probes[f"curve {factor}"]["standing"] for factor in CURVE_FACTORS]
        facts["curve"] = build_curve(flags, spec.ball)
    report = build_report(samples, names, checks=checks, **facts)
    failures = probes.get("gallery", {}).get("failures", []) or text_failures(samples, spec.split)
    folder, all_known = (None, False) if kept is None else (kept.path, kept.all_known)
    return Evaluation(report, samples, failures, folder, all_known, names)


def _evaluate_edits(
    spec: EvalSpec, config: EditThreatConfig, workers: Workers, cache: Path | None, progress: Progress | None
) -> Evaluation:
    """Search every text for a misclassified edit, and run the masking checks of texts."""
    checks = TEXT_CHECKS if spec.full else {}
    factory = EditFactory.of(spec.model, spec.split, spec.dataset, config, spec.seed, dict(checks))
    kept = None if cache is None else _open_cache(cache, spec, [], workers)
    run = build_runner(factory, workers, spec.device)
    with nullcontext() if kept is None else kept.opened():
        run = run if kept is None else kept.through(run)
        samples = evaluate_texts(run, spec.split, config, progress)
        found = run_text_checks(run, samples, progress) if spec.full else []
    names = spec.dataset.class_names
    facts = spec.facts() | {"suite": attack_name(config.budget), "curve": edit_curve(samples, config)}
    facts["edits"] = EditFigures.of(samples, config, spec.dataset, spec.split)
    if found:
        found.append(beats_guessing(samples, names))
    report = build_report(samples, names, checks=found, **facts)
    folder, all_known = (None, False) if kept is None else (kept.path, kept.all_known)
    return Evaluation(report, samples, shortest_edits(samples), folder, all_known, names)


def _evaluate_regression(spec: EvalSpec) -> Evaluation:
    """Evaluate a regression with one attack, in both directions and with restarts.

    Suites and masking checks are for classifiers only.
    """
    if spec.edits is not None:
        raise UserError(
            f"edits of texts ({spec.edits}) are for classifiers; a regression is evaluated in a ball, such as linf:0.1"
        )
    if isinstance(spec.suite, str):
        raise UserError("suites are for classifiers; a regression is evaluated with evaluation.attack")
    device, facts = spec.device or default_device(), spec.facts()
    network = (spec.model.load() if isinstance(spec.model, ModelSource) else spec.model).to(device)
    how: dict[str, Any] = {"seed": spec.seed, "batch_size": spec.batch_size, "device": device}
    errors = attack_targets(network, spec.split, GradientAttack(spec.suite), spec.ball, **how)
    if spec.full:
        facts["curve"] = error_curve(network, spec.split, spec.ball, **how)
    return Evaluation(build_error_report(errors, **facts), errors)


def _open_cache(
    cache: Path, spec: EvalSpec, attacks: Sequence[FailureSearch], workers: Workers
) -> ResultCache:
    """Return the cache of this evaluation, keyed by everything that affects a result."""
    if not isinstance(spec.model, ModelSource):
        raise TypeError("a cached evaluation needs a ModelSource, because its key has the model's digest")
    facts = spec.facts()
    shaping = ("model_digest", "data", "split", "data_digest", "norm", "eps", "seed")
    key = {name: facts[name] for name in shaping} | {
        "versions": {name: facts["versions"][name] for name in ("torch", "torchvision", "numpy")},
        "code": code_digest(),
        "edits": None if spec.edits is None else _edit_key(spec, spec.edits),
        "attack": None if isinstance(spec.suite, str) else spec.suite.model_dump(mode="json"),
        "attacks": [attack.name for attack in attacks],
        "batch_size": spec.batch_size,
        "other": None if spec.other is None else digest_of([spec.other]),
        "transfer": [a.source.digest for a in attacks if isinstance(a, TransferAttack)],
        "device": (spec.device or default_device()).type,
        # Rounding may depend on the number of threads; a worker has one thread.
        "threads": 1 if workers.number != 0 else torch.get_num_threads(),
    }
    return ResultCache(cache, f"{facts['data']}-{spec.threat.norm}-{spec.threat.eps:.4g}", key)


def _edit_key(spec: EvalSpec, config: EditThreatConfig) -> dict[str, Any]:
    """Return everything else that affects edits of texts: settings, texts, table and tokenizer."""
    text = spec.dataset.text
    assert text is not None
    training = [] if (found := training_texts(spec.dataset, spec.seed)) is None else [*found[0]]
    return edit_facts(config, spec.dataset, spec.split) | {
        "training_digest": hashlib.sha256(json.dumps(training).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(text.tokenizer),
        "max_length": text.max_length,
        "tokenizers": library_versions(others=["tokenizers"])["tokenizers"],
    }


def load_report(folder: Path) -> AnyReport:
    """Read the report.json of a classifier or a regression."""
    try:
        return Report.load(folder)
    except UserError:
        return RegressionReport.load(folder)


def draw_figures(
    model: nn.Module,
    dataset: Dataset,
    report: AnyReport,
    threat: ThreatModel | EditThreatConfig,
    folder: Path,
    *,
    seed: int,
) -> None:
    """Write robustness_curve.png and, for image classifiers, examples.png.

    Both show PGD-20 on test samples; the curve of edits shows their search. A model that embeds its inputs has no
    examples.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(report, folder / "robustness_curve.png")
    if isinstance(threat, EditThreatConfig) or dataset.regression or len(dataset.shape) != 3 or embeds(model):
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
