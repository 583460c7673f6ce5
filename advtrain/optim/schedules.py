"""Learning rate schedules as functions of the position in the run."""

from __future__ import annotations

import math

from advtrain.recipe.optimizer import ScheduleConfig


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
