"""Gradient ascent on the input: FGSM, FGSM with a random start, PGD. One loop, three presets.

- `fgsm`    one step of length eps from the clean input (Goodfellow et al. 2015, arXiv 1412.6572)
- `fgsm_rs` one step of 1.25 eps from a uniform start, projected (Wong et al. 2020, arXiv 2001.03994)
- `pgd`     k projected steps from a uniform start (Madry et al. 2018, arXiv 1706.06083)

Deviation: the projection is onto ball and box together (the nearest point of B(x)); published l2 code
projects onto the ball and then clips, which is another point.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from advtrain.attacks.base import BatchNormMode, attacked, input_gradient, predictions
from advtrain.attacks.losses import ATTACK_LOSSES
from advtrain.lookup import Config, Number
from advtrain.threat import ThreatModel

AttackName = Literal["fgsm", "fgsm_rs", "pgd"]

_PRESETS: dict[str, dict[str, Any]] = {
    "fgsm": {"num_steps": 1, "start": "none"},
    "fgsm_rs": {"num_steps": 1, "start": "uniform"},
    "pgd": {"num_steps": 10, "start": "uniform"},
}


class AttackConfig(Config):
    """A gradient attack. The radius is not part of it: it comes with the threat model."""

    name: AttackName = "pgd"
    """fgsm, fgsm_rs or pgd"""
    num_steps: int = Field(ge=1)
    """gradient steps (fgsm and fgsm_rs: 1)"""
    step_size: Number | None = Field(default=None, gt=0)
    """step length in input units; null: eps (fgsm), 1.25 eps (fgsm_rs), 2.5 eps / num_steps (pgd)"""
    start: Literal["uniform", "gaussian", "none"]
    """uniform in the ball; gaussian: 0.001 N(0, 1), as TRADES starts; none: the clean input"""
    num_restarts: int = Field(default=1, ge=1)
    """independent starts; per sample the one with the highest loss counts"""
    loss: Literal["ce", "kl"] = "ce"
    """what the attack climbs: ce of the label, or kl from the clean prediction (TRADES)"""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return _PRESETS.get(str(given.get("name", "pgd")), {}) | given
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name != "pgd" and self.num_steps != 1:
            raise ValueError(f"{self.name} takes one step, not {self.num_steps}; use pgd for more")
        if self.name == "fgsm" and self.start != "none":
            raise ValueError("fgsm starts at the clean input; use fgsm_rs for a random start")
        if self.num_restarts > 1 and self.start == "none":
            raise ValueError("restarts from the same point give the same result; set start: uniform")
        if self.loss == "kl" and self.start == "none":
            raise ValueError("the gradient of the KL is 0 at the clean input; set start: gaussian")
        return self


class GradientAttack:
    """The attack that an AttackConfig describes."""

    def __init__(self, config: AttackConfig, batch_norm: BatchNormMode = "eval") -> None:
        self.config = config
        self.batch_norm: BatchNormMode = batch_norm

    def scaled(self, factor: float) -> GradientAttack:
        """Return the attack with `factor` times the step size, for a scaled threat model."""
        size = self.config.step_size
        if size is None:  # relative to eps already
            return self
        return GradientAttack(self.config.model_copy(update={"step_size": size * factor}), self.batch_norm)

    def step_size(self, threat: ThreatModel) -> float:
        """Return the step length in input units."""
        if self.config.step_size is not None:
            return self.config.step_size
        factor = {"fgsm": 1.0, "fgsm_rs": 1.25, "pgd": 2.5 / self.config.num_steps}[self.config.name]
        return factor * threat.eps

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return adversarial inputs (N, ...): per sample the restart with the highest final loss."""
        with attacked(model, self.batch_norm):
            x_adv = self._climb(model, x, y, threat, generator)
            if self.config.num_restarts == 1:
                return x_adv
            with torch.no_grad():
                loss = ATTACK_LOSSES[self.config.loss](model, x)
                best = loss(model(x_adv).float(), y)
                for _ in range(self.config.num_restarts - 1):
                    again = self._climb(model, x, y, threat, generator)
                    value = loss(model(again).float(), y)
                    higher = value > best
                    best = torch.where(higher, value, best)
                    x_adv[higher] = again[higher]
            return x_adv

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One start, for evaluation: return (x_adv (N, ...), fooled (N,) bool).

        Every iterate counts: a sample misclassified on the way keeps the iterate that did it.
        """
        with attacked(model, self.batch_norm):
            found_x, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
            x_adv = self._climb(model, x, y, threat, generator, (found_x, fooled))
            with torch.no_grad():
                _keep_fooling((found_x, fooled), x_adv, model(x_adv), y)
            found_x[~fooled] = x_adv[~fooled]
            return found_x, fooled

    def _climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        found: tuple[Tensor, Tensor] | None = None,  # of `find_failures`, filled in place
    ) -> Tensor:
        """Climb from one start, x_{t+1} = Proj_B(x)(x_t + alpha steepest(gradient)); return the last iterate."""
        alpha, project = self.step_size(threat), threat.projection(x)
        loss = ATTACK_LOSSES[self.config.loss](model, x)
        x_adv = self._start(x, threat, generator)
        for _ in range(self.config.num_steps):
            gradient, logits = input_gradient(model, x_adv, y, loss)
            if found is not None:
                _keep_fooling(found, x_adv, logits, y)
            x_adv = project(x_adv.add(threat.steepest(gradient), alpha=alpha))
        return x_adv

    def _start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator | None) -> Tensor:
        if self.config.start == "none":
            return x.detach()
        if self.config.start == "uniform":
            return threat.random_start(x, generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return threat.project(x + 0.001 * noise, x)


def _keep_fooling(found: tuple[Tensor, Tensor], x_adv: Tensor, logits: Tensor, y: Tensor) -> None:
    """Record, in place, the iterates of samples that are misclassified for the first time."""
    found_x, fooled = found
    new = (predictions(logits) != y) & ~fooled
    found_x[new] = x_adv[new]
    fooled |= new
