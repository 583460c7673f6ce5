"""Validation of a network during training, on one rank's share of the validation split."""

from __future__ import annotations

import numpy as np
from torch import nn

from advtrain.attacks import GradientAttack
from advtrain.data import Dataset, Place, Split
from advtrain.evaluation.edits import EditFactory
from advtrain.evaluation.regression import validation_errors
from advtrain.evaluation.worst_case import validation_accuracy
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.sections import EvaluationConfig


def validate(
    network: nn.Module, split: Split, dataset: Dataset, judge: EvaluationConfig, place: Place
) -> dict[str, float]:
    """Return sums over this rank's share: samples, and correct and robust ones or errors.

    Args:
        network: network, on the device of `place`.
        split: validation samples of all ranks.
        dataset: data set of the split, with tokenizer and table for edits of texts.
        judge: evaluation settings.
        place: rank and device.
    """
    threat = judge.threat_model
    if isinstance(threat, EditThreatConfig):
        return _validate_edits(network, split, dataset, threat, judge.seed, place)
    measure = validation_errors if dataset.regression else validation_accuracy
    attack = GradientAttack(judge.validation)
    return measure(network, split, attack, threat, seed=judge.seed, batch_size=judge.batch_size, place=place)


def _validate_edits(
    network: nn.Module, split: Split, dataset: Dataset, threat: EditThreatConfig, seed: int, place: Place
) -> dict[str, float]:
    """Search edits with the budget of the validation; a text is searched alike on any number of ranks."""
    cheaper = threat.model_copy(update={"budget": threat.validation_budget})
    evaluator = EditFactory.of(network, split, dataset, cheaper, seed, {})(place.device)
    rows = np.arange(place.rank, len(split), place.world_size)
    found = evaluator.verdicts(rows) if len(rows) else []
    clean, robust = (
        float(sum(flags))
        for flags in ([v.broken_at != 0 for v in found], [v.broken_at is None for v in found])
    )
    return {"clean_accuracy": clean, "robust_accuracy": robust, "samples": float(len(rows))}
