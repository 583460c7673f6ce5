"""Averages of the weights over training: EMA and SWA (Izmailov et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advtrain.recipe.optimizer import OptimizerConfig


def build_average(config: OptimizerConfig, model: nn.Module) -> AveragedModel | None:
    """Build the averaged copy of `model`, or return None without EMA and SWA.

    The buffers of batch norm follow the model (EMA) or are recomputed (SWA), see `recompute_statistics`.
    """
    if config.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
    elif config.swa_start_epoch is not None:
        average = AveragedModel(model)  # equal weights (Izmailov et al. 2018, arXiv 1803.05407)
    else:
        return None
    return average.requires_grad_(False)


@torch.no_grad()
def recompute_statistics(network: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set the running statistics of batch norm to the mean over `inputs`, batches (N, ...).

    Modules in evaluation mode are frozen: unlike with torch's `update_bn`, they stay in it and keep their statistics.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
    momenta = {norm: norm.momentum for norm in norms}
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the statistics are the mean over all batches
    for batch in inputs:
        network(batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
