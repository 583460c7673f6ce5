"""Attacks by name: ATTACKS for training, SEARCHES and SUITES for evaluation."""

from collections.abc import Callable

from torch import Tensor

from advtrain.attacks.base import (
    Attack,
    FailureSearch,
    attack_mode,
    frozen_bn_stats,
    input_gradient,
    logits_of,
    predictions,
)
from advtrain.attacks.checks import check_inputs, check_label_type, check_labels, check_least_label
from advtrain.attacks.custom import CustomAttack
from advtrain.attacks.fab import FastAdaptiveBoundary
from advtrain.attacks.losses import ATTACK_LOSSES
from advtrain.attacks.pgd import GradientAttack
from advtrain.attacks.rays import RayS
from advtrain.attacks.square import Square
from advtrain.attacks.student import StudentTransfer
from advtrain.attacks.suites import SEARCHES, build_suite, check_suite
from advtrain.attacks.transfer import TransferAttack
from advtrain.recipe.attack import ATTACKS, REGRESSION_LOSSES, AttackConfig, BatchNormMode
from advtrain.recipe.suites import SUITES

__all__ = [
    "ATTACK_LOSSES",
    "ATTACKS",
    "REGRESSION_LOSSES",
    "SEARCHES",
    "SUITES",
    "RayS",
    "Square",
    "StudentTransfer",
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
    "check_inputs",
    "check_label_type",
    "check_labels",
    "check_least_label",
    "check_suite",
    "input_gradient",
    "logits_of",
    "predictions",
    "frozen_bn_stats",
]


def build_attack(
    config: AttackConfig,
    batch_norm: BatchNormMode = "eval",
    *,
    check_inputs: bool = True,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Attack:
    """Build the training attack that a configuration describes.

    Without `check_inputs` the attack does not read values of its inputs, so it does not wait for the device. For data
    that were checked when they were loaded. `teacher` maps inputs to logits, for the loss kl_teacher.
    """
    if config.custom:
        return CustomAttack(config, batch_norm, check_inputs=check_inputs)
    return GradientAttack(config, batch_norm, check_inputs=check_inputs, teacher=teacher)
