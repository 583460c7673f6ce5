"""Trained model of a run: architecture from the recipe, weights from the best checkpoint."""

from __future__ import annotations

from advtrain.data import Dataset
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder


def trained_model(run: RunFolder, recipe: Recipe, dataset: Dataset) -> ModelSource:
    """Return the run's best model by validation robust accuracy."""
    return ModelSource.of(best_checkpoint(run.checkpoints).best_weights(), architecture(recipe, dataset))


def architecture(recipe: Recipe, dataset: Dataset) -> Architecture:
    """Return the architecture of a recipe's model."""
    return Architecture(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
