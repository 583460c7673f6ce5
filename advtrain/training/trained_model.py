"""Trained model of a run: architecture from the recipe, weights from the best checkpoint."""

from __future__ import annotations

import numpy as np

from advtrain.attacks import build_suite, check_suite
from advtrain.data import Dataset, Place
from advtrain.models.network import attack_view, embeds
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder


def trained_model(run: RunFolder, recipe: Recipe, dataset: Dataset) -> ModelSource:
    """Return the run's best model by validation robust accuracy."""
    return ModelSource.of(best_checkpoint(run.checkpoints).best_weights(), architecture(recipe, dataset))


def check_model(recipe: Recipe, dataset: Dataset) -> None:
    """Raise a UserError if the model cannot be built, trained, or attacked by the suite.

    Some attacks search balls around inputs only, and a model may perturb an embedding instead.
    """
    model, suite = architecture(recipe, dataset).check(), recipe.evaluation.suite
    if suite is not None and embeds(model):
        (batch,) = dataset.train.take(np.arange(2)).batches(2, Place())
        _, _, threat = attack_view(model, batch.x, recipe.evaluation.threat_model)
        check_suite(build_suite(suite), threat)


def architecture(recipe: Recipe, dataset: Dataset) -> Architecture:
    """Return the architecture of a recipe's model."""
    return Architecture(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
