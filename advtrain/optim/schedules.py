"""Learning rate schedules as functions of the position in the run."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from advtrain.schema import Config, Number


class ScheduleConfig(Config):
    """Learning rate schedule; optimizer.lr is multiplied by its value."""

    kind: Literal["constant", "multistep", "cosine", "one_cycle"] = "constant"
    """schedule: constant, multistep, cosine (to final_fraction), one_cycle (up to lr at `peak`, then down)"""
    warmup_epochs: Number = Field(default=0.0, ge=0)
    """epochs over which the rate rises linearly from 0 (not with one_cycle, which has its own warm-up)"""
    milestones: list[Number] = Field(default_factory=list)
    """multistep: epochs at which the rate is multiplied by gamma"""
    gamma: Number = Field(default=0.1, gt=0, le=1)
    """multistep: factor at each milestone"""
    peak: Number = Field(default=0.4, gt=0, lt=1)
    """one_cycle: fraction of the run at which the rate reaches lr"""
    final_fraction: Number = Field(default=0.0, ge=0, le=1)
    """cosine, one_cycle: final rate as a fraction of lr"""

    @model_validator(mode="after")
    def _applies(self) -> Self:
        used = {"multistep": {"milestones", "gamma"}, "cosine": {"final_fraction"}}.get(self.kind, set())
        if self.kind == "one_cycle":
            used = {"peak", "final_fraction"}
        for name in ("milestones", "gamma", "peak", "final_fraction"):
            if name in self.model_fields_set and name not in used and getattr(self, name) != _default(name):
                raise ValueError(f"schedule '{self.kind}' has no {name}")
        if self.kind == "multistep" and self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be increasing, not {self.milestones}")
        if self.kind == "multistep" and not self.milestones:
            raise ValueError("multistep needs milestones, for example [100, 105]")
        if self.kind == "one_cycle" and self.warmup_epochs:
            raise ValueError("one_cycle has its own warm-up; use peak instead of warmup_epochs")
        return self


def _default(name: str) -> Any:
    return ScheduleConfig.model_fields[name].get_default(call_default_factory=True)


def lr_factor(config: ScheduleConfig, epoch: float, num_epochs: int) -> float:
    """Return the factor on the learning rate at a position in epochs (1.5: mid of the second).

    one_cycle is the linear triangle of Wong et al. 2020 (0 -> lr -> final), not the cosine schedule of
    torch.optim.lr_scheduler.OneCycleLR.
    """
    if config.kind == "one_cycle":
        top = config.peak * num_epochs
        if epoch < top:
            return epoch / top
        return 1 - (1 - config.final_fraction) * (epoch - top) / (num_epochs - top)
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if config.kind == "multistep":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.kind == "cosine":
        passed = (epoch - config.warmup_epochs) / (num_epochs - config.warmup_epochs)
        return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * passed)) / 2
    return 1.0
