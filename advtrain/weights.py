"""What is done to the weights beside the optimizer's step: moving them uphill (SAM, AWP), averaging (EMA, SWA)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from advtrain.optim import OptimizerConfig


def uphill(config: OptimizerConfig, epoch: float) -> Literal["sam", "awp"] | None:
    """Return by which method gradients are taken at weights moved uphill, at a position in the run in epochs.

    Batch norm's statistics are those of SAM's first pass, at the weights that are kept, and of AWP's second one,
    as in the authors' codes.
    """
    if config.sam_rho is not None:
        return "sam"
    return "awp" if config.awp_gamma is not None and epoch >= config.awp_warmup_epochs else None


@contextmanager
def moved_uphill(config: OptimizerConfig, model: nn.Module) -> Iterator[None]:
    """Move the weights along the gradients that they hold; afterwards they are what they were, bit for bit.

    - SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2): w + rho g / ||g||_2, the norm over all weights.
    - AWP (Wu et al. 2020, arXiv 2004.05884): each tensor of two or more dimensions to
      w + gamma ||w|| g / ||g||, one step, the norms its own.

    Under DDP the gradients are reduced, so every rank moves alike. The weights are put back from a copy:
    subtracting what was added would not give the same bits, and replicas would drift apart.
    """
    held = [p for p in model.parameters() if p.grad is not None]
    if config.awp_gamma is not None:
        held = [p for p in held if p.dim() > 1]
    gradients = [p.grad for p in held if p.grad is not None]
    copies = [p.detach().clone() for p in held]
    with torch.no_grad():
        if config.sam_rho is not None:
            total = torch.nn.utils.get_total_norm(gradients)
            for p, gradient in zip(held, gradients, strict=True):
                p.add_(gradient * _rate(config.sam_rho, total))
        elif config.awp_gamma is not None:
            for p, gradient in zip(held, gradients, strict=True):
                p.add_(gradient * _rate(config.awp_gamma * p.norm(), gradient.norm()))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, copy in zip(held, copies, strict=True):
                p.copy_(copy)


def _rate(length: float | Tensor, norm: Tensor) -> Tensor:
    """Return length / norm; 0 where the gradient has vanished and has no direction that float32 could tell."""
    return torch.where(norm > 1e-18, length / norm.clamp_min(1e-18), 0.0)


def build_average(config: OptimizerConfig, model: nn.Module) -> AveragedModel | None:
    """Build the averaged copy of `model`, or None. Batch norm's buffers follow the model's own (EMA), or are
    recomputed (SWA): see `recompute_statistics`."""
    if config.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
    elif config.swa_start_epoch is not None:
        average = AveragedModel(model)  # equal shares (Izmailov et al. 2018, arXiv 1803.05407)
    else:
        return None
    return average.requires_grad_(False)


def recompute_statistics(network: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set batch norm's running statistics to the mean over `inputs`, batches (N, ...) as the network is fed."""
    update_bn(inputs, network)
