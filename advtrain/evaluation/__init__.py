"""evaluate(model, dataset) -> Report: clean and worst-case robust accuracy on the test split, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from advtrain.attacks import AttackConfig, build_attack
from advtrain.data import Dataset, Split
from advtrain.environment import library_versions
from advtrain.evaluation.pictures import accuracy_curve, draw_curve, draw_examples
from advtrain.evaluation.report import Report, Share, build_report, wilson
from advtrain.evaluation.suite import Progress, SampleResults, attack_samples, count_correct, describe
from advtrain.threat import ThreatModel

__all__ = [
    "Report",
    "SampleResults",
    "Share",
    "attack_samples",
    "count_correct",
    "describe",
    "draw_pictures",
    "evaluate",
    "wilson",
]


def evaluate(
    model: nn.Module,
    split: Split,
    dataset: Dataset,
    attack: AttackConfig,
    threat: ThreatModel,
    *,
    name: str,
    split_name: str = "test",
    seed: int = 0,
    batch_size: int = 500,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> tuple[Report, SampleResults]:
    """Judge `model` on `split`.

    Args:
        model: maps (N, C, H, W) float in [0, 1] to logits (N, K); left as it was found.
        split: the samples; `dataset` gives the names and the digest that go into the report.
        name: what the report calls the model.
        split_name: what the report calls the split.
    """
    device = device or torch.device("cpu")
    samples = attack_samples(
        model,
        split,
        [build_attack(attack)],
        threat,
        seed=seed,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    report = build_report(
        samples,
        model=name,
        data=dataset.name,
        split=split_name,
        data_digest=dataset.digest,
        class_names=dataset.class_names,
        threat=threat,
        seed=seed,
        versions=library_versions(),
    )
    return report, samples


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
    """Write robustness_curve.png and examples.png, both from PGD-20 on test samples."""
    attack = build_attack(AttackConfig.model_validate({"num_steps": 20}))
    points = accuracy_curve(
        model, dataset.test, attack, threat, seed=seed, batch_size=batch_size, device=device
    )
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(points, threat, attack, folder / "robustness_curve.png")
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
