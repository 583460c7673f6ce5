"""Teacher of a new run: resolve it, check it against the data, and complete the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from advtrain.attacks import attack_mode
from advtrain.data import Dataset
from advtrain.data.summary import distinct_names
from advtrain.errors import UserError
from advtrain.models.serialized import Architecture
from advtrain.models.start import fit_weights, weights_digest
from advtrain.objective.references import head_inputs, require_same_width, the_features
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.recipe.model import ModelConfig
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.lineage import Ancestor
from advtrain.runs.start import ResolvedWeights
from advtrain.runs.teacher import RunTeacher, require_same_code
from advtrain.training.trained_model import architecture


def prepare_teacher(
    recipe: Recipe, dataset: Dataset, resolve: Callable[[str], ResolvedWeights]
) -> tuple[Recipe, RunTeacher | None]:
    """Resolve the teacher of a recipe; return the recipe with its digest, and the teacher.

    Args:
        recipe: recipe of a new run.
        dataset: its data.
        resolve: returns the weights that `objective.teacher` names.

    Raises:
        UserError: the teacher cannot be read, has another digest than `objective.teacher_digest`, or does not suit the
            data or the terms.
    """
    objective = recipe.objective
    if objective.teacher is None:
        return recipe, None
    what = f"objective.teacher '{objective.teacher}'"
    try:
        resolved = resolve(objective.teacher)
    except UserError as error:
        reason = str(error).removeprefix(f"model.from '{objective.teacher}': ")
        raise UserError(f"{what}: {reason}") from error
    resolved = replace(resolved, ancestor=replace(resolved.ancestor, role="teacher"))
    if objective.teacher_digest not in (None, resolved.digest):
        raise UserError(
            f"{what} has other weights (digest {resolved.digest[:12]}) than objective.teacher_digest "
            f"({str(objective.teacher_digest)[:12]}); name the model that is meant, or remove objective.teacher_digest"
        )
    if "hat" in objective.used and resolved.ancestor.data_digest != dataset.digest:
        raise UserError(
            f"{what} was trained on other data or another split than {dataset.name}, or it is not known on which; hat "
            "needs a standard model that was trained with the same data section"
        )
    made = _architecture(recipe, dataset, resolved, what)
    _require_same_classes(resolved.classes, dataset, what)
    with torch.random.fork_rng([]):
        network, own = made.build(), architecture(recipe, dataset).build()
        advice = "a teacher must have the classes of the data"
        weights = fit_weights(resolved.weights, network, source=what, advice=advice).weights
        network.load_state_dict(weights)
        _check_outputs(network, own, recipe, dataset, what)
    pinned = objective.model_copy(update={"teacher_digest": resolved.digest})
    return recipe.model_copy(update={"objective": pinned}), RunTeacher(resolved, weights, made)


def find_teacher(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """Return the best model of the run that `objective.teacher` names."""
    reference = str(recipe.objective.teacher)
    run = RunFolder.find(Path(), reference)
    weights = dict(best_checkpoint(run.checkpoints).best_weights())
    digest, data_digest = weights_digest(weights), run.facts().get("data_digest")
    theirs = load_stored_recipe(run.path / "recipe.yaml", allow_code=True)
    ancestor = Ancestor("teacher", reference, digest, run.name, data_digest)
    _, found = prepare_teacher(recipe, dataset, lambda _: ResolvedWeights(weights, ancestor, theirs.model))
    assert found is not None
    return found.build()


def _architecture(recipe: Recipe, dataset: Dataset, resolved: ResolvedWeights, what: str) -> Architecture:
    """Return the teacher's architecture; a file has that of the recipe's own model."""
    theirs, here = resolved.config or recipe.model, architecture(recipe, dataset)
    require_same_code(theirs, recipe.model, what)
    config = ModelConfig.model_validate(theirs.architecture)
    made = resolved.architecture
    if made is None:
        return Architecture(config, here.shape, here.num_classes, here.target_scale)
    for kind, taught, needed in (
        ("inputs of shape", tuple(made.shape), tuple(here.shape)),
        ("classes:", made.num_classes, here.num_classes),
    ):
        if taught != needed:
            raise UserError(f"{what} has {kind} {taught}, but {dataset.name} has {needed}")
    return Architecture(config, here.shape, here.num_classes, made.target_scale)


def _require_same_classes(theirs: list[str] | None, dataset: Dataset, what: str) -> None:
    """Raise a UserError if the teacher's classes have other names than those of the data.

    Classes without names are called 0, 1, ... These numbers are not compared with names that are words.
    """
    numbers = [str(label) for label in range(dataset.num_classes)]
    own = distinct_names(dataset.class_names, dataset.num_classes)
    if theirs is None or numbers in (theirs, own) and not all(name.isdecimal() for name in [*theirs, *own]):
        return
    for label, (taught, needed) in enumerate(zip(theirs, own, strict=False)):
        if taught != needed:
            raise UserError(
                f"{what} has '{taught}' as class {label}, but {dataset.name} has '{needed}'; a teacher must have the "
                "classes of the data, by the same names and in the same order"
            )


def _check_outputs(network: nn.Module, own: nn.Module, recipe: Recipe, dataset: Dataset, what: str) -> None:
    """Raise a UserError if the teacher does not run on the data, or has other outputs or features."""
    x = torch.zeros(2, *dataset.shape)
    try:
        outputs, features = _outputs_and_features(network, x)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{what} does not run on inputs of shape {tuple(dataset.shape)}: {error}") from error
    if outputs.shape != (2, dataset.num_classes or 1):
        raise UserError(
            f"{what} gives {tuple(outputs.shape[1:])} outputs, but {dataset.name} has {dataset.num_classes} classes"
        )
    if "feature_match" in recipe.objective.used:
        require_same_width(
            the_features(_outputs_and_features(own, x)[1], "the model"), the_features(features, what)
        )


def _outputs_and_features(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    with attack_mode(model), torch.no_grad(), head_inputs(model) as features:
        return model(x), features
