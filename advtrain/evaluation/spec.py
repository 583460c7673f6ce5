"""Specification of an evaluation: model, samples, attacks and threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from advtrain.attacks import AttackConfig, FailureSearch, GradientAttack, build_suite, check_suite
from advtrain.data import Dataset, Split
from advtrain.data.units import feature_units
from advtrain.environment import library_versions
from advtrain.errors import UserError
from advtrain.evaluation.edits import attack_name
from advtrain.evaluation.texts import text_facts
from advtrain.models.libraries import libraries_used
from advtrain.models.network import embeds
from advtrain.models.serialized import ModelSource
from advtrain.recipe.edits import EditThreatConfig
from advtrain.threat import ThreatModel


@dataclass(frozen=True)
class EvalSpec:
    """Specification of an evaluation: model, samples, attacks and threat model.

    Attributes:
        model: maps (N, ...) float in [0, 1] to logits (N, K), or to predictions (N, 1) for a regression. It is moved to
            the device of this process and not changed otherwise.
        split: samples to evaluate. `dataset` provides the names and the digest for the report.
        suite: name of a suite, comma-separated attacks (`attacks/suites.py`), or one attack. A regression needs one
            attack.
        name: name of the model in the report.
        split_name: name of the split in the report. With the data digest, it must identify the samples.
        batch_size: samples per forward pass. A work item has up to four batches with at most 128 MiB of inputs
            (`worst_case.py`). The random starts depend on it.
        extra: additional attacks, run after the suite.
        full: also run the masking checks and compute the curve and the gallery.
        training_threat: threat model of the training, for the check of the training radius; None: unknown or no ball.
        command: command that repeats the evaluation, for the report.
        device: device of an evaluation in this process; None: the GPU if there is one.
        other: samples that were held back, for the check `other_images`; None: images are moved by a pixel.
        training_copies: number of samples that equal a training sample, for the report; None: unknown.

    The threat model is a ball, or the edits of texts. Edits need no suite; words need `dataset.synonyms`.

    Raises:
        UserError: the threat model has radius_scale, free or group 'token'. A report has one norm and one eps.
    """

    model: nn.Module | ModelSource
    split: Split
    dataset: Dataset
    suite: AttackConfig | str
    threat: ThreatModel | EditThreatConfig
    name: str
    split_name: str = "test"
    seed: int = 0
    batch_size: int = 250
    extra: Sequence[FailureSearch] = ()
    full: bool = False
    training_threat: ThreatModel | None = None
    command: str | None = None
    device: torch.device | None = None
    other: Split | None = None
    training_copies: int | None = None

    def __post_init__(self) -> None:
        threat = self.threat
        if isinstance(threat, EditThreatConfig):
            return
        if threat.radius_scale is not None or threat.free is not None or threat.group != "sample":
            raise UserError("evaluate takes no radius_scale, free or group 'token': a report has one radius")

    @property
    def ball(self) -> ThreatModel:
        """Threat model of attacks on tensors."""
        assert isinstance(self.threat, ThreatModel)
        return self.threat

    @property
    def edits(self) -> EditThreatConfig | None:
        """Edits of texts if they are the threat model; None: a ball."""
        return self.threat if isinstance(self.threat, EditThreatConfig) else None

    def build_attacks(self) -> list[FailureSearch]:
        """Return the attacks of the suite, followed by the extra attacks; none for edits of texts.

        Raises:
            UserError: an attack does not support the threat model.
        """
        suite = self.suite
        if isinstance(self.threat, EditThreatConfig):
            return []
        found = build_suite(suite, self.threat.norm) if isinstance(suite, str) else [GradientAttack(suite)]
        attacks = [*found, *self.extra]
        check_suite(attacks, self.threat)  # fail before the first attack runs
        return attacks

    @property
    def attack_names(self) -> list[str]:
        """Names of the attacks in the report."""
        return (
            [attack.name for attack in self.build_attacks()]
            if self.edits is None
            else [attack_name(self.edits.budget)]
        )

    def facts(self) -> dict[str, Any]:
        """Return the conditions of the evaluation, as fields of the report."""
        model = self.model
        libraries = model.libraries if isinstance(model, ModelSource) else libraries_used(model)
        is_embedded = model.embeds if isinstance(model, ModelSource) else embeds(model)
        return {
            "model": self.name,
            "model_digest": model.digest if isinstance(model, ModelSource) else None,
            "data": self.dataset.name,
            "data_digest": self.dataset.digest,
            "file": self.dataset.file,
            "training_copies": self.training_copies,
            "features": feature_units(self.dataset.table),
            "space": "embedding" if is_embedded and self.edits is None else "input",
            "text": text_facts(self.dataset.text, self.split),
            "split": self.split_name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "seed": self.seed,
            "command": self.command,
            "versions": library_versions(others=libraries),
        }
