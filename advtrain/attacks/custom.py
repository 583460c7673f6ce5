"""Custom training attacks: `adversary.name: "my_package.attacks:factory"` and --allow-code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advtrain.attacks.base import Attack, attack_mode
from advtrain.attacks.checks import check_inputs as check
from advtrain.errors import UserError
from advtrain.recipe.attack import AttackConfig, BatchNormMode
from advtrain.schema import load_attribute, with_numbers
from advtrain.threat import ThreatModel


class CustomAttack:
    """Attack by a custom function (model, x, y, threat, generator) -> x_adv (N, ...).

    The factory returns the function. It runs in attack mode: evaluation mode, parameters without gradients, running
    statistics of batch norm unchanged. During a warm-up the radius of `threat` grows, so the function needs no change.
    """

    def __init__(
        self, config: AttackConfig, batch_norm: BatchNormMode = "eval", *, check_inputs: bool = True
    ) -> None:
        self.config, self.batch_norm, self.check_inputs = config, batch_norm, check_inputs
        factory = load_attribute(config.name, "adversary.name")
        try:
            self.function = factory(**with_numbers(config.args))
        except Exception as error:  # a custom factory may raise any exception
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"adversary.name '{config.name}' with args {config.args}: {reason}") from error
        if not callable(self.function):
            kind = type(self.function).__name__
            raise UserError(
                f"adversary.name '{config.name}' returned a {kind}, not a function (model, x, y, threat, generator)"
            )

    def scaled(self, factor: float) -> Attack:
        """Return the attack itself, because its radius comes from the threat model."""
        return self

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the adversarial inputs of the custom function, (N, ...) like x, detached."""
        if self.check_inputs:
            check(x, y, threat, regression=y.is_floating_point())
        with attack_mode(model, self.batch_norm):
            x_adv = self.function(model, x, y, threat, generator)
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            got = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise UserError(
                f"adversary.name '{self.config.name}' returned {got}, not a tensor {tuple(x.shape)} like x"
            )
        return x_adv.detach()
