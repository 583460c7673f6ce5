"""The table of attacks: AttackConfig -> a callable (model, x, y, threat, generator) -> x_adv."""

from advtrain.attacks.base import (
    Attack,
    BatchNormMode,
    attack_mode,
    frozen_bn_stats,
    input_gradient,
    predictions,
)
from advtrain.attacks.config import PRESETS, AttackConfig
from advtrain.attacks.fab import FastAdaptiveBoundary
from advtrain.attacks.losses import ATTACK_LOSSES, REGRESSION_LOSSES
from advtrain.attacks.pgd import GradientAttack
from advtrain.attacks.square import Square
from advtrain.attacks.suites import SUITES, FailureSearch, build_suite, check_suite
from advtrain.attacks.transfer import TransferAttack

__all__ = [
    "ATTACK_LOSSES",
    "PRESETS",
    "REGRESSION_LOSSES",
    "SUITES",
    "Square",
    "TransferAttack",
    "Attack",
    "AttackConfig",
    "BatchNormMode",
    "FailureSearch",
    "FastAdaptiveBoundary",
    "GradientAttack",
    "attack_mode",
    "build_attack",
    "build_suite",
    "check_suite",
    "input_gradient",
    "predictions",
    "frozen_bn_stats",
]


def build_attack(config: AttackConfig, batch_norm: BatchNormMode = "eval") -> GradientAttack:
    """Build the attack that a configuration describes."""
    return GradientAttack(config, batch_norm)
