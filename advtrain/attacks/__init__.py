"""The table of attacks: AttackConfig -> a callable (model, x, y, threat, generator) -> x_adv."""

from advtrain.attacks.base import (
    Attack,
    BatchNormMode,
    attacked,
    input_gradient,
    predictions,
    statistics_kept,
)
from advtrain.attacks.gradient import PRESETS, AttackConfig, GradientAttack
from advtrain.attacks.losses import ATTACK_LOSSES, REGRESSION_LOSSES

__all__ = [
    "ATTACK_LOSSES",
    "PRESETS",
    "REGRESSION_LOSSES",
    "Attack",
    "AttackConfig",
    "BatchNormMode",
    "GradientAttack",
    "attacked",
    "build_attack",
    "input_gradient",
    "predictions",
    "statistics_kept",
]


def build_attack(config: AttackConfig, batch_norm: BatchNormMode = "eval") -> GradientAttack:
    """Build the attack that a configuration describes."""
    return GradientAttack(config, batch_norm)
