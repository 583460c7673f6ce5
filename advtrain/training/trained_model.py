"""Trained model of a run: architecture from the recipe, weights from the best checkpoint."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from advtrain.attacks import build_suite, check_suite
from advtrain.data import Dataset, Place
from advtrain.errors import UserError
from advtrain.models.network import Normalized, attack_view, embedding_table, embeds
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import TrainState, best_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.threat import ThreatModel
from advtrain.training.contract import check_contract


def trained_model(run: RunFolder, recipe: Recipe, dataset: Dataset) -> ModelSource:
    """Return the run's best model by validation robust accuracy."""
    state = best_checkpoint(run.checkpoints)
    require_recipe(state, recipe)
    return ModelSource.of(state.best_weights(), architecture(recipe, dataset))


def move_hint(run: RunFolder) -> str:
    """Return what to do if the run's data has moved."""
    is_trial = "trial" in run.facts()
    command = f"tune --resume {run.path.parents[1].name}" if is_trial else f"train --resume {run.name}"
    return f"record its new path with `advtrain {command} --set data.path=PATH`"


def require_recipe(state: TrainState, recipe: Recipe) -> None:
    """Raise a UserError if a checkpoint was trained with another recipe."""
    expected = recipe.until(state.epoch + bool(state.step_in_epoch)).digest()
    if state.recipe_digest != expected:
        raise UserError(
            f"the checkpoint at step {state.step} belongs to another recipe ({state.recipe_digest[:6]}, "
            f"not {expected[:6]}); restore the recipe.yaml with which the run was trained"
        )


def check_model(recipe: Recipe, dataset: Dataset) -> list[str]:
    """Raise a UserError if the model cannot be trained or attacked; return notes about it.

    Some attacks search balls around inputs only, and a model may perturb an embedding instead. The global random
    number generator is left as it was.
    """
    with torch.random.fork_rng([]):
        model, suite = architecture(recipe, dataset).check(), recipe.evaluation.suite
    if recipe.adversary.per == "token" and not embeds(model):
        raise UserError(
            f"adversary.per token is for networks that embed their inputs; model '{recipe.model.name}' does not"
        )
    if recipe.relative_lengths and recipe.adversary.embedding_norm is None:
        require_table(model, recipe)
    threat = recipe.evaluation.threat_model
    if suite is not None and embeds(model) and isinstance(threat, ThreatModel):
        (batch,) = dataset.train.take(np.arange(2)).batches(2, Place())
        _, _, threat = attack_view(model, batch.x, threat)
        check_suite(build_suite(suite, threat.norm), threat)
    return check_contract(model, recipe, dataset)


def require_table(model: Normalized, recipe: Recipe) -> Tensor:
    """Return the rows of the network's embedding table without padding, (V, D) float, detached.

    Raises:
        UserError: it has none, although a length of the recipe is relative to it.
    """
    table = embedding_table(model.network)
    if table is None:
        raise UserError(
            f"{recipe.relative_lengths[0]} is relative to the embedding table of a network of texts, and model "
            f"'{recipe.model.name}' has none; write a number"
        )
    return table


def architecture(recipe: Recipe, dataset: Dataset) -> Architecture:
    """Return the architecture of a recipe's model."""
    return Architecture(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
