"""Averages of the weights over training: EMA and SWA (Izmailov et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

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


def recompute_statistics(network: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set the running statistics of batch norm to the mean over `inputs`, batches (N, ...)."""
    update_bn(inputs, network)
