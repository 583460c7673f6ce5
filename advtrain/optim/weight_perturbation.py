"""Weight perturbation for SAM and AWP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from advtrain.recipe.optimizer import OptimizerConfig


@contextmanager
def perturbed_weights(config: OptimizerConfig, model: nn.Module) -> Iterator[None]:
    """Perturb the weights along their gradients inside the block, then restore them exactly.

    - SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2): w + rho g / ||g||_2, with the norm over all weights.
    - AWP (Wu et al. 2020, arXiv 2004.05884): w + gamma ||w|| g / ||g|| in one step, for each tensor of two or more
      dimensions with its own norms.

    Under DDP the gradients are reduced, so all ranks apply the same perturbation. The weights are restored from a copy,
    because subtraction would not give the same bits and replicas would drift apart.
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
    """Return length / norm, or 0 where the gradient has no direction that float32 can resolve."""
    return torch.where(norm > 1e-18, length / norm.clamp_min(1e-18), 0.0)
