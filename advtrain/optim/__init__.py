"""Optimizers, learning rate schedules, weight averaging and weight perturbation."""

from advtrain.optim.averaging import build_average, recompute_statistics
from advtrain.optim.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
)
from advtrain.optim.schedules import lr_factor
from advtrain.optim.weight_perturbation import perturbed_weights
from advtrain.recipe.optimizer import OptimizerConfig, ScheduleConfig

__all__ = [
    "OPTIMIZERS",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_average",
    "build_optimizer",
    "clip_gradients",
    "load_optimizer_tensors",
    "lr_factor",
    "perturbed_weights",
    "optimizer_tensors",
    "recompute_statistics",
]
