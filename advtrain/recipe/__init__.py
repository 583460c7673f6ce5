"""The recipe: one YAML file that fully defines a training run."""

from advtrain.recipe.paths import override, parse_override, set_path
from advtrain.recipe.recipe import Recipe, load_recipe, load_stored_recipe, parse_recipe
from advtrain.recipe.sections import AdversaryConfig, EvaluationConfig, GuardConfig, TrainingConfig

__all__ = [
    "AdversaryConfig",
    "EvaluationConfig",
    "GuardConfig",
    "Recipe",
    "TrainingConfig",
    "load_recipe",
    "load_stored_recipe",
    "override",
    "parse_override",
    "parse_recipe",
    "set_path",
]
