"""evaluate(model, dataset) -> Report: clean and worst-case robust accuracy on the test split, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from advtrain.attacks import AttackConfig, Square, build_attack, build_suite
from advtrain.data import Dataset, Split
from advtrain.environment import library_versions
from advtrain.evaluation.errors import (
    Estimate,
    RegressionReport,
    attack_targets,
    build_error_report,
    validation_errors,
)
from advtrain.evaluation.pictures import draw_curve, draw_examples, robustness_curve
from advtrain.evaluation.report import Report, Samples, Share, build_report, wilson
from advtrain.evaluation.suite import Progress, SampleResults, attack_samples, validation_accuracy
from advtrain.lookup import UserError
from advtrain.threat import ThreatModel

AnyReport = Report | RegressionReport

__all__ = [
    "AnyReport",
    "Estimate",
    "RegressionReport",
    "Report",
    "SampleResults",
    "Share",
    "attack_samples",
    "draw_pictures",
    "evaluate",
    "load_report",
    "validation_accuracy",
    "validation_errors",
    "wilson",
]


def evaluate(
    model: nn.Module,
    split: Split,
    dataset: Dataset,
    attack: AttackConfig | str,
    threat: ThreatModel,
    *,
    name: str,
    split_name: str = "test",
    seed: int = 0,
    batch_size: int = 500,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> tuple[AnyReport, Samples]:
    """Judge `model` on `split`.

    Args:
        model: maps (N, ...) float in [0, 1] to logits (N, K), or predictions (N, 1); left as it was found.
        attack: one attack, or a suite by name or as a list (`attacks/suites.py`); a regression takes the former.
        split: the samples; `dataset` gives the names and the digest that go into the report.
        name: what the report calls the model.
        split_name: what the report calls the split.
    """
    device = device or torch.device("cpu")
    facts = {
        "model": name,
        "data": dataset.name,
        "split": split_name,
        "data_digest": dataset.digest,
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        "versions": library_versions(),
    }
    if dataset.regression:
        if isinstance(attack, str):
            raise UserError("suites are for classifiers; a regression is judged by evaluation.attack")
        errors = attack_targets(
            model, split, build_attack(attack), threat, seed=seed, batch_size=batch_size, device=device
        )
        return build_error_report(errors, **facts), errors
    attacks = build_suite(attack) if isinstance(attack, str) else [build_attack(attack)]
    for one in attacks:
        if isinstance(one, Square):  # before the attacks that come first have taken their time
            one.check(threat)
    samples = attack_samples(
        model,
        split,
        attacks,
        threat,
        seed=seed,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return build_report(samples, dataset.class_names, **facts), samples


def load_report(folder: Path) -> AnyReport:
    """Read report.json, of a classifier or of a regression."""
    try:
        return Report.load(folder)
    except UserError:
        return RegressionReport.load(folder)


def draw_pictures(
    model: nn.Module,
    dataset: Dataset,
    threat: ThreatModel,
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> None:
    """Write robustness_curve.png and, of images with classes, examples.png, both from PGD-20 on test samples."""
    values = {"num_steps": 20, "loss": "mae" if dataset.regression else "ce"}
    attack = build_attack(AttackConfig.model_validate(values))
    points = robustness_curve(
        model, dataset.test, attack, threat, seed=seed, batch_size=batch_size, device=device
    )
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(points, threat, attack, folder / "robustness_curve.png")
    if dataset.regression or len(dataset.shape) != 3:
        return
    draw_examples(
        model,
        dataset.test,
        attack,
        threat,
        dataset.class_names,
        seed=seed,
        device=device,
        path=folder / "examples.png",
    )
