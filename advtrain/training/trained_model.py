"""The model that a run has trained: its architecture from the recipe, its weights from the best checkpoint."""

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
    """Return what a recipe's model is built from."""
    return Architecture(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
